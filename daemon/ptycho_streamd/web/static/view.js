// The image on its canvas: moved, zoomed and read out by mouse, touch and keyboard; two panes half
// and half; path, scale bar and cross hair. Lengths are pixels of pane a's canvas, counted from
// their edges; the middle of pixel (0, 0) is the stage's origin.

import { scaleBar } from "./format.js";

const MAX_RATIO = 2; // more device pixels than this a CSS pixel are not worth their bytes
const MARGIN = 0.04;
const HYSTERESIS = 0.82; // an image that fits is left alone while it fills so much of the view
const WHEEL = 0.0016;
const LOOK_MS = 90;

export class View {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{a: Pane, b: Pane}} panes
   * @param {object} on `pointed(place)`: the place under pointer or cross hair, or null.
   */
  constructor(canvas, panes, on) {
    this.canvas = canvas;
    this.panes = panes;
    this.on = on;
    this.centre = [0, 0];
    this.zoom = 1; // device pixels a canvas pixel
    this.follows = true;
    this.divider = 0.5;
    this.path = null;
    this.showPath = false;
    this.cross = null;
    this.pointers = new Map();
    this.isDue = false;
    new ResizeObserver(() => this.resize()).observe(canvas);
    this.listen();
    this.resize();
  }

  // -- where things are ----------------------------------------------------------------------

  get ratio() {
    return Math.min(window.devicePixelRatio || 1, MAX_RATIO);
  }

  resize() {
    const { clientWidth, clientHeight } = this.canvas;
    this.canvas.width = Math.max(1, Math.round(clientWidth * this.ratio));
    this.canvas.height = Math.max(1, Math.round(clientHeight * this.ratio));
    if (this.follows) this.fit(true);
    this.moved();
  }

  /** Top, left, bottom and right of what pane a shows. */
  get bounds() {
    return this.panes.a.words?.bounds_yx_px ?? null;
  }

  /** Show all of the image. With `always` also if it is all in view already. */
  fit(always) {
    const bounds = this.bounds;
    if (!bounds) return;
    const [top, left, bottom, right] = bounds;
    const room = 1 - 2 * MARGIN;
    const wanted = Math.min(
      (this.canvas.height * room) / Math.max(bottom - top, 8),
      (this.canvas.width * room) / Math.max(right - left, 8),
    );
    if (!always && this.isInView(bounds) && this.zoom > HYSTERESIS * wanted * 0.7) return;
    // A growing image gets some room, so that it is not moved with every frame.
    this.zoom = always ? wanted : wanted * HYSTERESIS;
    this.centre = [(top + bottom) / 2, (left + right) / 2];
    this.moved();
  }

  isInView([top, left, bottom, right]) {
    const [y0, x0] = this.placeAt(0, 0);
    const [y1, x1] = this.placeAt(this.canvas.width, this.canvas.height);
    return top >= y0 && left >= x0 && bottom <= y1 && right <= x1;
  }

  /** The place under a device pixel. */
  placeAt(px, py) {
    return [
      this.centre[0] + (py - this.canvas.height / 2) / this.zoom,
      this.centre[1] + (px - this.canvas.width / 2) / this.zoom,
    ];
  }

  devicePixel(y, x) {
    return [
      (x - this.centre[1]) * this.zoom + this.canvas.width / 2,
      (y - this.centre[0]) * this.zoom + this.canvas.height / 2,
    ];
  }

  /** Where pane b lies on pane a's canvas: its pixel's size, and its shift in canvas pixels. */
  get alignment() {
    const [a, b] = [this.panes.a.words, this.panes.b.words];
    if (!a?.pixel_yx_m || !b?.pixel_yx_m) return { size: [1, 1], shift: [0, 0], centred: false };
    const size = [0, 1].map((k) => b.pixel_yx_m[k] / a.pixel_yx_m[k]);
    // The middles of the pixels (0, 0) coincide.
    const shift = size.map((s) => 0.5 * (1 - s));
    if (!a.bounds_yx_px || !b.bounds_yx_px || a.scan_id === b.scan_id) {
      return { size, shift, centred: false };
    }
    const there = b.bounds_yx_px.map((at, k) => at * size[k % 2] + shift[k % 2]);
    const here = a.bounds_yx_px;
    const apart = [0, 1].some((k) => there[k] >= here[k + 2] || there[k + 2] <= here[k]);
    if (!apart) return { size, shift, centred: false };
    // Scans of different places are laid over each other by their middles.
    for (const k of [0, 1]) shift[k] += (here[k] + here[k + 2] - there[k] - there[k + 2]) / 2;
    return { size, shift, centred: true };
  }

  get comparing() {
    return Boolean(this.panes.b.wish);
  }

  get dividerPx() {
    return Math.round(this.divider * this.canvas.width);
  }

  // -- what is asked for ---------------------------------------------------------------------

  /** The view has changed: draw, and ask for what is in it now, a little later. */
  moved() {
    this.draw();
    clearTimeout(this.lookTimer);
    this.lookTimer = setTimeout(() => this.lookNow(), LOOK_MS);
  }

  lookNow() {
    const level = this.follows && !this.bounds ? 0 : Math.max(0, Math.floor(Math.log2(1 / this.zoom)));
    const [top, left] = this.placeAt(0, 0);
    const [bottom, right] = this.placeAt(this.canvas.width, this.canvas.height);
    const pad = 0.2 * Math.max(bottom - top, right - left);
    const { size, shift } = this.alignment;
    for (const pane of Object.values(this.panes)) {
      const isA = pane === this.panes.a;
      const [s, d] = isA ? [[1, 1], [0, 0]] : [size, shift];
      const edges = [top - pad, left - pad, bottom + pad, right + pad];
      const window = this.follows && isA
        ? null
        : edges.map((at, k) => Math.round((at - d[k % 2]) / s[k % 2]));
      const finer = Math.max(0, level - (isA ? 0 : Math.round(Math.log2(s[0]))));
      const key = JSON.stringify([window, finer, pane.stream]);
      if (pane.wish && key !== pane.lookedAt) {
        pane.lookedAt = key;
        pane.look(window, finer);
      }
    }
  }

  // -- drawing -------------------------------------------------------------------------------

  draw() {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      this.paint();
    });
  }

  paint() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    context.clearRect(0, 0, width, height);
    const at = this.comparing ? this.dividerPx : width;
    this.paintPane(context, this.panes.a, 0, at, { size: [1, 1], shift: [0, 0] });
    if (this.comparing) this.paintPane(context, this.panes.b, at, width, this.alignment);
    const style = getComputedStyle(this.canvas);
    const ink = style.getPropertyValue("--text").trim();
    const well = style.getPropertyValue("--well").trim();
    const accent = style.getPropertyValue("--accent").trim();
    if (this.showPath && this.path) this.paintPath(context, ink, accent);
    if (this.comparing) this.paintDivider(context, at, ink, well);
    if (this.cross) this.paintCross(context, ink, well);
    this.paintScale(context, ink, well);
  }

  paintPane(context, pane, from, to, { size, shift }) {
    const { set, painter } = pane;
    if (!set || !painter || to <= from) return;
    context.save();
    context.beginPath();
    context.rect(from, 0, to - from, this.canvas.height);
    context.clip();
    const current = set.levelFor(pane.level);
    // Others lie under those of the level that is shown, the coarsest on top of finer, older ones.
    const order = (tile) => (tile.level === current ? Infinity : tile.level);
    const tiles = [...set.tiles.values()].sort((one, other) => order(one) - order(other));
    for (const tile of tiles) {
      const extent = set.side * 2 ** tile.level;
      const edges = [tile.ty, tile.tx].map((t, k) =>
        [t, t + 1].map((e) => e * extent * size[k] + shift[k]));
      const [x0, y0] = this.devicePixel(edges[0][0], edges[1][0]).map(Math.round);
      const [x1, y1] = this.devicePixel(edges[0][1], edges[1][1]).map(Math.round);
      if (x1 <= from || x0 >= to || y1 <= 0 || y0 >= this.canvas.height) continue;
      context.imageSmoothingEnabled = x1 - x0 < set.side;
      context.drawImage(set.painted(tile, painter), x0, y0, x1 - x0, y1 - y0);
    }
    context.restore();
  }

  paintPath(context, ink, accent) {
    const points = this.path;
    if (!points.length) return;
    context.save();
    context.lineWidth = this.ratio;
    context.strokeStyle = ink;
    context.globalAlpha = 0.45;
    context.beginPath();
    for (const [y, x] of points) context.lineTo(...this.devicePixel(y + 0.5, x + 0.5));
    context.stroke();
    const [lastY, lastX] = points.at(-1);
    const [px, py] = this.devicePixel(lastY + 0.5, lastX + 0.5);
    context.globalAlpha = 1;
    context.strokeStyle = accent;
    context.lineWidth = 2 * this.ratio;
    context.beginPath();
    context.arc(px, py, 7 * this.ratio, 0, 2 * Math.PI);
    context.stroke();
    context.restore();
  }

  paintDivider(context, at, ink, well) {
    context.fillStyle = well;
    context.fillRect(at - 2 * this.ratio, 0, 4 * this.ratio, this.canvas.height);
    context.fillStyle = ink;
    context.fillRect(at - this.ratio / 2, 0, this.ratio, this.canvas.height);
    context.beginPath();
    context.arc(at, this.canvas.height / 2, 9 * this.ratio, 0, 2 * Math.PI);
    context.fillStyle = ink;
    context.fill();
    context.fillStyle = well;
    context.font = `${12 * this.ratio}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText("↔", at, this.canvas.height / 2);
  }

  paintCross(context, ink, well) {
    const [px, py] = this.devicePixel(...this.cross).map(Math.round);
    for (const [colour, width] of [[well, 3], [ink, 1]]) {
      context.strokeStyle = colour;
      context.lineWidth = width * this.ratio;
      context.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        context.moveTo(px + 4 * dx * this.ratio, py + 4 * dy * this.ratio);
        context.lineTo(px + 14 * dx * this.ratio, py + 14 * dy * this.ratio);
      }
      context.stroke();
    }
  }

  paintScale(context, ink, well) {
    const pixel = this.panes.a.words?.pixel_yx_m;
    if (!pixel || !this.panes.a.set) return;
    const { length_m, label } = scaleBar((110 * this.ratio * pixel[1]) / this.zoom);
    const length = (length_m / pixel[1]) * this.zoom;
    const [left, bottom] = [14 * this.ratio, this.canvas.height - 14 * this.ratio];
    context.font = `600 ${12 * this.ratio}px system-ui, sans-serif`;
    const textWidth = context.measureText(label).width;
    context.fillStyle = well;
    context.globalAlpha = 0.72;
    context.fillRect(left - 8 * this.ratio, bottom - 24 * this.ratio,
      Math.max(length, textWidth) + 16 * this.ratio, 32 * this.ratio);
    context.globalAlpha = 1;
    context.fillStyle = ink;
    context.fillRect(left, bottom - 3 * this.ratio, length, 3 * this.ratio);
    context.textAlign = "left";
    context.textBaseline = "bottom";
    context.fillText(label, left, bottom - 5 * this.ratio);
  }

  // -- mouse, touch and keys -----------------------------------------------------------------

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => this.onDown(event));
    canvas.addEventListener("pointermove", (event) => this.onMove(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => this.onUp(event));
    }
    canvas.addEventListener("pointerleave", () => { if (!this.cross) this.on.pointed(null); });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY * WHEEL), ...this.pixelOf(event));
    }, { passive: false });
    canvas.addEventListener("dblclick", () => this.fitAll());
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  pixelOf(event) {
    return [event.offsetX * this.ratio, event.offsetY * this.ratio];
  }

  onDown(event) {
    const [px, py] = this.pixelOf(event);
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [px, py]);
    this.isDividing = this.comparing && this.pointers.size === 1
      && Math.abs(px - this.dividerPx) < 14 * this.ratio;
    this.canvas.classList.toggle("moving", !this.isDividing);
  }

  onMove(event) {
    const [px, py] = this.pixelOf(event);
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      this.canvas.classList.toggle("dividing",
        this.comparing && Math.abs(px - this.dividerPx) < 14 * this.ratio);
      this.cross = null;
      this.on.pointed(this.pointed(px, py));
      return;
    }
    const distance = this.spread();
    this.pointers.set(event.pointerId, [px, py]);
    if (this.isDividing) {
      this.divide(px / this.canvas.width);
      return;
    }
    const share = 1 / this.pointers.size;
    this.panBy(-(px - before[0]) * share, -(py - before[1]) * share);
    if (this.pointers.size === 2) {
      const middle = [...this.pointers.values()];
      this.zoomBy(this.spread() / distance, (middle[0][0] + middle[1][0]) / 2,
        (middle[0][1] + middle[1][1]) / 2);
    }
    this.on.pointed(this.pointed(px, py));
  }

  onUp(event) {
    this.pointers.delete(event.pointerId);
    this.isDividing = false;
    this.canvas.classList.remove("moving");
  }

  spread() {
    const [one, other] = [...this.pointers.values()];
    return other ? Math.max(Math.hypot(one[0] - other[0], one[1] - other[1]), 1) : 1;
  }

  pointed(px, py) {
    const [y, x] = this.placeAt(px, py);
    return { y, x, pane: this.comparing && px > this.dividerPx ? "b" : "a" };
  }

  onKey(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (event.shiftKey) this.moveCross(step);
    else this.panBy(step[0] * 48 * this.ratio, step[1] * 48 * this.ratio);
  }

  /** Move the cross hair by pixels, at least one of the canvas. */
  moveCross([dx, dy]) {
    this.cross ??= this.placeAt(this.canvas.width / 2, this.canvas.height / 2)
      .map((at) => Math.floor(at) + 0.5);
    const by = Math.max(1, Math.round((4 * this.ratio) / this.zoom));
    this.cross = [this.cross[0] + dy * by, this.cross[1] + dx * by];
    const [px, py] = this.devicePixel(...this.cross);
    this.on.pointed(this.pointed(px, py));
    this.draw();
  }

  divide(share) {
    this.divider = Math.min(Math.max(share, 0.02), 0.98);
    this.draw();
  }

  panBy(px, py) {
    this.follows = false;
    this.centre = [this.centre[0] + py / this.zoom, this.centre[1] + px / this.zoom];
    this.moved();
  }

  zoomBy(factor, px = this.canvas.width / 2, py = this.canvas.height / 2) {
    this.follows = false;
    const zoom = Math.min(Math.max(this.zoom * factor, 1e-3), 64 * this.ratio);
    const [y, x] = this.placeAt(px, py);
    this.centre = [
      y - (py - this.canvas.height / 2) / zoom,
      x - (px - this.canvas.width / 2) / zoom,
    ];
    this.zoom = zoom;
    this.moved();
  }

  fitAll() {
    this.follows = true;
    this.cross = null;
    this.fit(true);
  }
}
