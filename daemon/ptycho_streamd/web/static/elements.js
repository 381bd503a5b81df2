// Making and finding elements, with less to write.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; text is only ever text. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "class") element.className = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function makeSvg(name, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  return element;
}

/** Fill a definition list; rows whose value is null are left out. */
export function pairs(list, rows) {
  const wanted = rows.filter(([, value]) => value !== null && value !== undefined);
  const key = JSON.stringify(wanted.map(([name, value]) => [name, value?.outerHTML ?? value]));
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...wanted.flatMap(([name, value]) =>
    [make("dt", {}, name), make("dd", {}, value)]));
}

/** Set text and class only where they change, so that nothing flickers or is read out twice. */
export function tell(element, text, className = null) {
  if (element.textContent !== text) element.textContent = text;
  if (className !== null && element.className !== className) element.className = className;
}

/** Bring a list's children to what `items` ask for, keeping those whose key and content stay. */
export function reconcile(list, items, build) {
  const before = new Map([...list.children].map((child) => [child.dataset.key, child]));
  const wanted = items.map(([key, item]) => {
    const content = JSON.stringify(item);
    const known = before.get(key);
    if (known?.dataset.content === content) return known;
    const hadFocus = known?.contains(document.activeElement);
    const element = build(item);
    element.dataset.key = key;
    element.dataset.content = content;
    if (hadFocus) {
      known.replaceWith(element);
      (element.matches("button") ? element : element.querySelector("button"))?.focus();
    }
    return element;
  });
  const same = wanted.length === list.children.length
    && wanted.every((element, i) => list.children[i] === element);
  if (same) return;
  const focused = document.activeElement;
  list.replaceChildren(...wanted);
  if (wanted.some((element) => element.contains(focused))) focused.focus({ preventScroll: true });
}
