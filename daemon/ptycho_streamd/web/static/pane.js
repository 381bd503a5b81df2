// One pane of the image: what it is to show, what it has of it, and how that is coloured.

import { Correction, Painter, TileSet } from "./tiles.js";

const STATISTICS_MS = 400;
const STEADY = 0.04; // a range that moves by less of its width stays, so that colours do not flicker

export class Pane {
  /**
   * @param {string} name "a" or "b"
   * @param {(look: object) => void} send tells the viewer what the pane is to show
   * @param {() => void} changed called when there is something new to draw
   */
  constructor(name, send, changed) {
    this.name = name;
    this.sendLook = send;
    this.changed = changed;
    this.stream = 0;
    this.wish = null;
    this.window = null;
    this.level = 0;
    this.options = { ramp: false, map: "viridis", contrast: {} };
    this.clear();
  }

  clear() {
    this.words = null;
    this.set = null;
    this.quantity = null;
    this.comingWords = null;
    this.mean = 0;
    this.slope = null;
    this.autoRange = null;
    this.painter = null;
    this.measuredAt = 0;
    this.timer ??= null;
  }

  /** Show another picture or quantity; what is there stays until the new one comes. */
  show(wish) {
    this.wish = wish;
    this.stream++;
    this.tell();
  }

  /** Show another part of it, or at another level of detail. */
  look(window, level) {
    this.window = window;
    this.level = level;
    this.tell();
  }

  close() {
    this.wish = null;
    this.sendLook({ type: "look", pane: this.name, stream: ++this.stream, nothing: true });
    this.clear();
    this.changed();
  }

  /** Say again what is to be shown: after a new connection too. */
  tell() {
    if (!this.wish) return;
    const look = { type: "look", pane: this.name, stream: this.stream, ...this.wish };
    this.sendLook({ ...look, level: this.level, window: this.window });
  }

  onPicture(head) {
    if (head.stream !== this.stream) return;
    if (head.fresh) {
      this.comingWords = head.words;
      // Without a picture there is nothing that could come in its place.
      if (head.words.problem !== "") {
        const quantity = this.quantity;
        this.clear();
        this.quantity = quantity;
        this.words = head.words;
      } else if (!this.set) this.words = head.words;
    } else if (this.comingWords) Object.assign(this.comingWords, head.words);
    else this.words = { ...this.words, ...head.words };
    this.changed();
  }

  onTiles(head, bytes) {
    if (head.stream !== this.stream) return;
    if (this.comingWords) {
      const same = this.words && this.words.scan_id === this.comingWords.scan_id
        && this.quantity === this.wish.quantity;
      this.words = this.comingWords;
      this.comingWords = null;
      this.set = new TileSet(head.side);
      this.quantity = this.wish.quantity;
      if (!same) this.autoRange = null;
      this.measuredAt = 0;
    }
    if (!this.set) return;
    this.set.take(head, bytes);
    this.measureSoon();
    this.changed();
  }

  get isPhase() {
    return this.quantity === "phase";
  }

  get correction() {
    return new Correction(this.isPhase, this.mean, this.slope, this.set.side);
  }

  /** Low and high end of the colours, values of the quantity. */
  get range() {
    const chosen = this.options.contrast[this.quantity];
    if (chosen) return chosen;
    // The colours of a cyclic map come round once in a turn.
    if (this.isPhase && this.options.map === "twilight") return [-Math.PI, Math.PI];
    return this.autoRange ?? [0, 1];
  }

  /** Use other options: flattening, colour map, contrast by quantity. */
  use(options) {
    const rampChanged = options.ramp !== this.options.ramp;
    this.options = options;
    if (rampChanged) {
      this.measuredAt = 0;
      this.autoRange = null;
    }
    if (this.set) this.measure();
    this.changed();
  }

  measureSoon() {
    const wait = this.measuredAt + STATISTICS_MS - performance.now();
    if (wait <= 0) this.measure();
    else this.timer ??= setTimeout(() => { this.measure(); this.changed(); }, wait);
  }

  /** Find mean, ramp and range of the picture as it is; keep those that have hardly changed. */
  measure() {
    clearTimeout(this.timer);
    this.timer = null;
    if (!this.set) return;
    this.measuredAt = performance.now();
    const level = this.set.levelFor(this.level);
    if (this.isPhase) {
      const fresh = this.autoRange === null;
      const slope = this.options.ramp ? this.set.ramp(level) : null;
      const span = fresh ? 0 : this.autoRange[1] - this.autoRange[0];
      // What a slope comes to over a tile is what would be seen of its change.
      const moved = slope && this.slope
        ? this.set.side * 2 ** level * Math.max(...slope.map((s, k) => Math.abs(s - this.slope[k])))
        : Infinity;
      if (!slope || moved > STEADY * span) this.slope = slope;
      const mean = this.set.meanPhase(level, this.slope);
      if (fresh || Math.abs(Math.sin(mean - this.mean)) > STEADY * span) this.mean = mean;
    } else [this.mean, this.slope] = [0, null];
    const range = this.set.range(level, this.correction);
    if (range) {
      if (range[1] - range[0] < 1e-6) range[1] = range[0] + 1e-6;
      const [low, high] = this.autoRange ?? [NaN, NaN];
      const tolerance = STEADY * (high - low);
      const steady = Math.abs(range[0] - low) < tolerance && Math.abs(range[1] - high) < tolerance;
      if (!steady) this.autoRange = range;
    }
    this.repaint();
  }

  repaint() {
    const [low, high] = this.range;
    const { map } = this.options;
    const same = this.painter && this.key === JSON.stringify([low, high, map, this.mean, this.slope]);
    if (same) return;
    this.key = JSON.stringify([low, high, map, this.mean, this.slope]);
    this.painter = new Painter(this.correction, low, high, map);
  }

  /** What is at a canvas pixel, or null. */
  valueAt(y, x) {
    const found = this.set?.valueAt(y, x, this.set.levelFor(this.level));
    return found && { ...found, value: this.correction.at(found.value, y, x) };
  }
}
