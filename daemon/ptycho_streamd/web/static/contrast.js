// Colour bar and both ends of the contrast under the image, and the value under the pointer in it.

import { colours } from "./colormaps.js";
import { byId, tell } from "./elements.js";
import { micrometres, number } from "./format.js";
import { QUANTITIES } from "./words.js";

export class Contrast {
  /** @param {(range: [number, number]|null) => void} chosen called with a choice; null: automatic */
  constructor(chosen) {
    this.chosen = chosen;
    this.range = [0, 1];
    this.low = byId("low");
    this.high = byId("high");
    this.bar = byId("colourbar");
    for (const input of [this.low, this.high]) {
      input.addEventListener("change", () => this.type());
    }
    byId("auto").addEventListener("click", () => this.chosen(null));
    this.bar.addEventListener("pointerdown", (event) => this.grab(event));
    this.bar.addEventListener("dblclick", () => this.chosen(null));
  }

  type() {
    const range = [Number(this.low.value), Number(this.high.value)];
    if (range.every(Number.isFinite) && this.low.value !== "" && range[0] < range[1]) {
      this.chosen(range);
    } else this.show(this.quantity, this.range, this.isAuto, this.map, true);
  }

  /** Drag the nearer end of the bar. */
  grab(event) {
    const width = this.bar.clientWidth;
    const end = event.offsetX < width / 2 ? 0 : 1;
    const start = event.clientX;
    const range = [...this.range];
    const span = range[1] - range[0];
    const move = (moved) => {
      const changed = [...range];
      // To the middle is more contrast, outwards less.
      changed[end] -= ((moved.clientX - start) / width) * span * -1;
      if (changed[0] < changed[1]) this.chosen(changed);
    };
    this.bar.setPointerCapture(event.pointerId);
    this.bar.addEventListener("pointermove", move);
    this.bar.addEventListener("pointerup", () =>
      this.bar.removeEventListener("pointermove", move), { once: true });
  }

  show(quantity, range, isAuto, map, always = false) {
    Object.assign(this, { quantity, range, isAuto, map });
    byId("auto").setAttribute("aria-pressed", String(isAuto));
    tell(byId("unit"), QUANTITIES[quantity]?.unit ?? "");
    const step = 10 ** Math.floor(Math.log10(Math.max(range[1] - range[0], 1e-9) / 20));
    [this.low, this.high].forEach((input, k) => {
      input.step = "any";
      if (document.activeElement === input && !always) return;
      const text = String(Number((Math.round(range[k] / step) * step).toPrecision(6)));
      if (input.value !== text) input.value = text;
    });
    if (this.painted !== map) {
      this.painted = map;
      const context = this.bar.getContext("2d");
      const image = context.createImageData(this.bar.width, this.bar.height);
      const pixels = new Uint32Array(image.data.buffer);
      const table = colours(map, this.bar.width);
      for (let p = 0; p < pixels.length; p++) pixels[p] = table[p % this.bar.width];
      context.putImageData(image, 0, 0);
    }
  }
}

/** Place and value under the pointer, in a corner of the image. */
export function showReadout(place, panes, alignment) {
  const output = byId("readout");
  const words = panes.a.words;
  output.hidden = !place || !words?.pixel_yx_m || !panes.a.set;
  if (output.hidden) return;
  const pane = panes[place.pane];
  const { size, shift } = place.pane === "b" ? alignment : { size: [1, 1], shift: [0, 0] };
  const [y, x] = [place.y, place.x].map((at, k) => (at - shift[k]) / size[k]);
  const found = pane.valueAt(y, x);
  const { name, unit } = QUANTITIES[pane.quantity] ?? { name: "", unit: "" };
  const value = found ? `${found.atEnd ? "about " : ""}${number(found.value, 4)} ${unit}` : "not seen";
  const pixel = pane.words?.pixel_yx_m ?? words.pixel_yx_m;
  const side = place.pane === "b" ? "right: " : "";
  tell(output, `${side}y ${micrometres((y - 0.5) * pixel[0])}  x ${micrometres((x - 0.5) * pixel[1])}`
    + `  ${name} ${value}`);
}
