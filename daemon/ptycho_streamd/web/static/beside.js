// The small pictures: the diffraction frame on a log scale, and the modes of the probe.

import { colours } from "./colormaps.js";
import { byId, make, tell } from "./elements.js";
import { count, micrometres, share } from "./format.js";

const MASKED = 0xff4a3a6e; // ABGR: a dull violet that no colour map has

/** Log counts as they were sent: 0 is masked, 1 to 255 go from none to the most. */
export function showFrame(head, bytes) {
  const canvas = byId("frame");
  const [height, width] = head.shape;
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const table = colours("magma", 255);
  for (let p = 0; p < pixels.length; p++) pixels[p] = bytes[p] ? table[bytes[p] - 1] : MASKED;
  context.putImageData(image, 0, 0);
  const place = head.position_yx_m
    ? `y ${micrometres(head.position_yx_m[0], 2)}, x ${micrometres(head.position_yx_m[1], 2)}`
    : "no position";
  const binned = head.bin_px > 1 ? `, ${head.bin_px} × ${head.bin_px} pixels summed` : "";
  const masked = head.masked > 0 ? `, ${share(head.masked)} masked` : "";
  tell(byId("frame-words"),
    `frame ${head.frame}${head.dark ? " (dark)" : ""}: ${count(head.total)} photons, at most `
    + `${count(head.most)} in a pixel${masked}${binned}; ${place}`);
  byId("frame-number").placeholder = "newest";
}

export function showNoFrame(reason) {
  const canvas = byId("frame");
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  tell(byId("frame-words"), reason);
}

/** Amplitude as brightness, phase as colour. */
export function showProbe(head, bytes) {
  const [modes, height, width] = head.shape;
  const hues = colours("twilight", 256);
  const figures = Array.from({ length: modes }, (_, mode) => {
    const canvas = make("canvas", { width, height, role: "img",
      "aria-label": `Mode ${mode + 1} of the probe, ${share(head.shares[mode])} of the photons` });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const from = 2 * mode * height * width;
    for (let p = 0; p < pixels.length; p++) {
      const light = bytes[from + p] / 255;
      const hue = hues[bytes[from + pixels.length + p]];
      const channel = (shift) => Math.round(((hue >>> shift) & 255) * light);
      pixels[p] = (255 << 24) | (channel(16) << 16) | (channel(8) << 8) | channel(0);
    }
    context.putImageData(image, 0, 0);
    return make("figure", {}, canvas, make("figcaption", {}, share(head.shares[mode])));
  });
  byId("probe").replaceChildren(...figures);
}
