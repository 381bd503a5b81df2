// Questions before anything is done, short messages after it, and the list of shortcuts.

import { byId, make } from "./elements.js";

const TOAST_MS = 6000;
const WORKING_MS = 300; // what is done sooner need not be announced

/**
 * Ask back. The cancel button has the focus, so that Enter alone does nothing.
 * @param {{title: string, text: string[], fields?: object[], action: string, danger?: boolean}} what
 * @returns {Promise<object|null>} the fields' values; null if it is not wanted.
 */
export function ask({ title, text, fields = [], action, danger = false }) {
  const dialog = byId("dialog");
  const inputs = fields.map((field) => [field, inputOf(field)]);
  const form = make("form", { method: "dialog" },
    make("h2", { id: "dialog-title" }, title),
    ...text.map((line) => make("p", {}, line)),
    ...inputs.map(([field, input]) => field.type === "checkbox"
      ? make("label", { class: "check" }, input, field.label)
      : make("label", {}, field.label, input)),
    make("div", { class: "row" },
      make("button", { type: "submit", value: "cancel", formnovalidate: true,
        autofocus: !inputs.length }, "Cancel"),
      make("button", { type: "submit", value: "do", class: danger ? "primary danger" : "primary" },
        action)));
  // Enter in a field must not press the first button, which is Cancel.
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.target.matches("button")) return;
    event.preventDefault();
    form.requestSubmit(form.querySelector("button.primary"));
  });
  return open(dialog, form).then((answer) => {
    if (answer !== "do") return null;
    return Object.fromEntries(inputs.map(([field, input]) => [field.name, valueOf(input)]));
  });
}

function inputOf(field) {
  if (field.type === "select") {
    return make("select", { name: field.name },
      ...field.options.map(([value, label]) =>
        make("option", { value, selected: value === field.value }, label)));
  }
  const { name, type = "text", value, ...rest } = field;
  delete rest.label;
  const checked = type === "checkbox" && value === true;
  const input = make("input", { name, type, checked, ...rest });
  if (type !== "checkbox") input.value = value ?? "";
  return input;
}

function valueOf(input) {
  if (input.type === "checkbox") return input.checked;
  return input.type === "number" ? Number(input.value) : input.value;
}

function open(dialog, content) {
  let answer = "cancel"; // as with Escape, which submits nothing
  content.addEventListener("submit", (event) => { answer = event.submitter?.value ?? "cancel"; });
  dialog.replaceChildren(content);
  dialog.showModal();
  return new Promise((resolve) => {
    const closed = () => {
      if (dialog.open && content.isConnected) return; // a late event, of the question before
      dialog.removeEventListener("close", closed);
      resolve(answer);
    };
    dialog.addEventListener("close", closed);
  });
}

/** A table of keys and what they do. */
export function showShortcuts(shortcuts) {
  const rows = shortcuts.map(([keys, words]) => make("tr", {},
    make("td", {}, ...keys.flatMap((key, i) => [i ? " " : "", make("kbd", {}, key)])),
    make("td", {}, words)));
  const form = make("form", { method: "dialog" },
    make("h2", { id: "dialog-title" }, "Keyboard"),
    make("table", {}, make("tbody", {}, ...rows)),
    make("div", { class: "row" }, make("button", { autofocus: true }, "Close")));
  return open(byId("dialog"), form);
}

/** Say in a corner what has come of something. */
export function toast(text, isBad = false) {
  const element = make("div", { class: isBad ? "toast bad" : "toast" }, text);
  byId("toasts").append(element);
  setTimeout(() => element.remove(), isBad ? 2 * TOAST_MS : TOAST_MS);
}

/** Say that something goes on, and for how long it has, until the function returned is called. */
export function working(text) {
  const element = make("div", { class: "toast working", "aria-live": "off" });
  const began = performance.now();
  const tell = () => {
    const seconds = Math.round((performance.now() - began) / 1000);
    element.textContent = `${text}… ${seconds ? `${seconds} s` : ""}`;
  };
  const soon = setTimeout(() => { tell(); byId("toasts").append(element); }, WORKING_MS);
  const clock = setInterval(tell, 1000);
  return () => {
    clearTimeout(soon);
    clearInterval(clock);
    element.remove();
  };
}
