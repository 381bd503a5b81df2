// Numbers, lengths and times as people read them.

const LENGTHS = [[1e-3, "mm"], [1e-6, "µm"], [1e-9, "nm"], [1e-12, "pm"]];

/** A number with so many significant digits and no needless zeros. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(digits - 1);
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return Number(value.toFixed(Math.min(decimals, 9))).toString();
}

/** A length in the unit that suits it. */
export function length(metres, digits = 3) {
  if (!Number.isFinite(metres)) return "–";
  const [unit, name] = LENGTHS.find(([one]) => Math.abs(metres) >= one) ?? LENGTHS.at(-1);
  return `${number(metres / unit, digits)} ${name}`;
}

/** A place in micrometres, always with as many decimals, so that it does not jump. */
export function micrometres(metres, decimals = 3) {
  return `${(metres * 1e6).toFixed(decimals).replace("-", "−")} µm`;
}

/** The round length at most as long as `metres`, for a scale bar. */
export function scaleBar(metres) {
  const power = 10 ** Math.floor(Math.log10(metres));
  const step = [5, 2, 1].find((one) => one * power <= metres) ?? 1;
  return { length_m: step * power, label: length(step * power) };
}

export function count(value) {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en");
}

export function share(value) {
  return `${number(100 * value, 2)} %`;
}

/** UTC nanoseconds as local date and time; of today the time only. */
export function time(ns) {
  const date = new Date(ns / 1e6);
  const clock = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const today = date.toDateString() === new Date().toDateString();
  if (today) return clock;
  return `${date.toLocaleDateString([], { day: "numeric", month: "short" })} ${clock}`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${number(seconds / 3600, 2)} h`;
}

export function milliseconds(ms) {
  return ms >= 2000 ? `${number(ms / 1000, 2)} s` : `${Math.round(ms)} ms`;
}

export function bytes(value) {
  if (value < 1e6) return `${number(value / 1e3, 3)} kB`;
  return value < 1e9 ? `${number(value / 1e6, 3)} MB` : `${number(value / 1e9, 3)} GB`;
}
