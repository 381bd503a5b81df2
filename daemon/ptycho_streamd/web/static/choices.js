// What the person at this page has chosen: in the address, so that it can be shared and comes back
// with a reload, and what is a matter of taste in the browser's own store.

const TASTE = "ptycho-stream";

export class Choices {
  constructor() {
    const address = new URLSearchParams(location.hash.slice(1));
    let taste = {};
    try {
      taste = JSON.parse(localStorage.getItem(TASTE)) ?? {};
    } catch {
      // A browser that keeps nothing, or something of somebody else's: begin with the defaults.
    }
    this.scanId = address.get("scan"); // null: the newest
    this.quantity = address.get("show") ?? "phase";
    this.part = address.get("layer") ?? "shown";
    this.compare = address.get("with") ?? "";
    this.ramp = address.has("flat");
    this.showPath = taste.showPath ?? false;
    this.theme = taste.theme ?? "system";
    this.maps = { phase: "viridis", amplitude: "viridis", misfit: "magma", coverage: "cividis",
      ...taste.maps };
    this.contrast = {}; // by quantity: [low, high]; absent: from the image
  }

  keep() {
    const address = new URLSearchParams();
    if (this.scanId) address.set("scan", this.scanId);
    if (this.quantity !== "phase") address.set("show", this.quantity);
    if (this.part !== "shown") address.set("layer", this.part);
    if (this.compare) address.set("with", this.compare);
    if (this.ramp) address.set("flat", "");
    history.replaceState(null, "", `#${address}`);
    const { showPath, theme, maps } = this;
    try {
      localStorage.setItem(TASTE, JSON.stringify({ showPath, theme, maps }));
    } catch {
      // It holds for this page then.
    }
  }

  /** Dark or light, as chosen or as the system has it. */
  applyTheme() {
    const isLight = this.theme === "light"
      || (this.theme === "system" && matchMedia("(prefers-color-scheme: light)").matches);
    document.documentElement.dataset.theme = isLight ? "light" : "dark";
  }
}
