// Small line charts: time from left to right, one axis, no more ink than needed.

import { number } from "./format.js";
import { makeSvg } from "./elements.js";

const LEFT = 40;
const BOTTOM = 15;
const TOP = 6;
const RIGHT = 6;
const MOST_POINTS = 400;

/** At most so many points, evenly over the whole, the last among them. */
function thinned(points) {
  if (points.length <= MOST_POINTS) return points;
  const step = (points.length - 1) / (MOST_POINTS - 1);
  return Array.from({ length: MOST_POINTS }, (_, i) => points[Math.round(i * step)]);
}

function ticks(low, high) {
  const raw = (high - low) / 2;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const found = [];
  for (let k = first; k * step <= high * (1 + 1e-9); k++) found.push(k * step);
  return found;
}

/**
 * @param {SVGElement} svg
 * @param {Array<Array<[number, number]>>} lines each of points (seconds, value)
 * @param {{fromZero?: boolean, ago?: boolean, least?: number}} options `least`: span of the axis
 */
export function chart(svg, lines, { fromZero = false, ago = false, least = 1e-6 } = {}) {
  const [width, height] = [svg.clientWidth || 290, svg.clientHeight || 90];
  const known = lines.map((points) => points.filter(([, value]) => Number.isFinite(value)));
  const all = known.flat();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [];
  if (!all.length) {
    parts.push(makeSvg("text", { x: LEFT, y: height / 2, class: "tick" }, "not known yet"));
    svg.replaceChildren(...parts);
    return;
  }
  const times = all.map(([at]) => at);
  const values = all.map(([, value]) => value);
  const [from, to] = [Math.min(...times), Math.max(...times)];
  let [low, high] = [fromZero ? 0 : Math.min(...values), Math.max(...values)];
  high = Math.max(high, low + Math.max(0.02 * Math.abs(high), least));
  const pad = fromZero ? 0 : 0.06 * (high - low);
  [low, high] = [low - pad, high + 0.06 * (high - low)];
  const px = (at) => LEFT + ((at - from) / (to - from || 1)) * (width - LEFT - RIGHT);
  const py = (value) => TOP + ((high - value) / (high - low)) * (height - TOP - BOTTOM);
  for (const value of ticks(low, high)) {
    const y = py(value);
    parts.push(makeSvg("line", { x1: LEFT, x2: width - RIGHT, y1: y, y2: y, class: "axis" }));
    parts.push(makeSvg("text",
      { x: LEFT - 5, y: y + 3.5, class: "tick", "text-anchor": "end" }, number(value, 3)));
  }
  const span = to - from;
  const words = span < 120 ? `${Math.round(span)} s` : `${number(span / 60, 2)} min`;
  const left = ago ? `${words} ago` : "0";
  const right = ago ? "now" : words;
  parts.push(makeSvg("text", { x: LEFT, y: height - 3, class: "tick" }, left));
  parts.push(makeSvg("text",
    { x: width - RIGHT, y: height - 3, class: "tick", "text-anchor": "end" }, right));
  known.forEach((points, index) => {
    if (points.length === 1) {
      const [[at, value]] = points;
      parts.push(makeSvg("circle",
        { cx: px(at), cy: py(value), r: 2.5, class: `dot-${index + 1}` }));
    }
    const path = thinned(points)
      .map(([at, value], i) => `${i ? "L" : "M"}${px(at).toFixed(1)} ${py(value).toFixed(1)}`)
      .join("");
    if (path) parts.push(makeSvg("path", { d: path, class: `line line-${index + 1}` }));
  });
  svg.replaceChildren(...parts);
}
