// Keyboard shortcuts of the page. Single keys work wherever nothing is being typed.

import { showShortcuts } from "./dialogs.js";

export const SHORTCUTS = [
  [["1", "2", "3", "4"], "phase, amplitude, misfit, coverage"],
  [["p"], "refined or predicted"],
  [["c"], "compare half and half, or no more"],
  [["[", "]"], "move the line between the halves"],
  [["r"], "flatten: remove the phase ramp"],
  [["w"], "path of the scan"],
  [["a"], "contrast from the image"],
  [["+", "−", "0"], "larger, smaller, all of it"],
  [["← → ↑ ↓"], "move the image, when it has the focus"],
  [["Shift + ← → ↑ ↓"], "move the cross hair, which reads out values"],
  [["j", "k"], "older or newer scan"],
  [["l"], "follow the newest scan"],
  [["s"], "snapshot"],
  [["e"], "export"],
  [["m"], "fine-tune the model"],
  [["x"], "abort the running scan"],
  [["t"], "dark or light"],
  [["?"], "this list"],
];

/** Listen for them; `help` is the button that shows the list. */
export function listenToKeys(help, actions) {
  help.addEventListener("click", () => showShortcuts(SHORTCUTS));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const isTyping = event.target.matches("input, select, textarea") || event.target.closest("dialog");
    if (isTyping) return;
    if (event.key === "?") {
      event.preventDefault();
      showShortcuts(SHORTCUTS);
      return;
    }
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}
