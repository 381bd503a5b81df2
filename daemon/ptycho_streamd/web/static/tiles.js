// The tiles of one picture: their values, their statistics, and their colours on canvases.

import { colours } from "./colormaps.js";
import { levelsOf, tilesOf } from "./wire.js";

const STEPS = 254;
const TURN = 2 * Math.PI;
const COLOURS = 1024;
const SAMPLES = 40_000; // statistics that need single pixels look at about so many

export const wrapped = (angle) => angle - TURN * Math.round(angle / TURN);

export class TileSet {
  constructor(side) {
    this.side = side;
    this.tiles = new Map();
    this.changes = 0;
  }

  /** Take a message's tiles in. */
  take(head, bytes) {
    for (const [level, ty, tx] of head.dropped) this.tiles.delete(`${level}/${ty}/${tx}`);
    for (const sent of tilesOf(head, bytes)) {
      const key = `${sent.level}/${sent.ty}/${sent.tx}`;
      const former = this.tiles.get(key);
      const levels = levelsOf(sent, this.side, former?.levels);
      const { level, ty, tx, low, high } = sent;
      const tile = { level, ty, tx, low, high, levels, canvas: former?.canvas ?? null, paint: null };
      tile.counts = new Uint32Array(256);
      for (let p = 0; p < levels.length; p++) tile.counts[levels[p]]++;
      this.tiles.set(key, tile);
    }
    this.changes++;
  }

  atLevel(level) {
    return [...this.tiles.values()].filter((tile) => tile.level === level);
  }

  /** The finest level that there are tiles of, at least `level`; else the coarsest below. */
  levelFor(level) {
    const levels = [...new Set([...this.tiles.values()].map((tile) => tile.level))];
    const coarser = levels.filter((one) => one >= level);
    return coarser.length ? Math.min(...coarser) : Math.max(...levels, 0);
  }

  /** The value at a canvas pixel, the finest that is known; null where nothing is. */
  valueAt(y, x, level) {
    for (let at = level; at <= level + 10; at++) {
      const size = this.side * 2 ** at;
      const tile = this.tiles.get(`${at}/${Math.floor(y / size)}/${Math.floor(x / size)}`);
      if (!tile) continue;
      const row = Math.floor(y / 2 ** at) - tile.ty * this.side;
      const column = Math.floor(x / 2 ** at) - tile.tx * this.side;
      const stored = tile.levels[row * this.side + column];
      if (stored === 0) return null;
      return { value: valueOf(tile, stored), atEnd: stored === 1 || stored === 255 };
    }
    return null;
  }

  /** Mean direction of phases, radians, after a ramp of `slope` is taken off. */
  meanPhase(level, slope) {
    const correct = new Correction(true, 0, slope, this.side);
    const values = slope ? this.sampled(this.atLevel(level), correct) : counted(this.atLevel(level), correct);
    let [re, im] = [0, 0];
    for (const [value, count] of values.values) {
      re += count * Math.cos(value);
      im += count * Math.sin(value);
    }
    return Math.atan2(im, re);
  }

  /** Slope of the phase along y and x in radians a canvas pixel: the mean step of neighbours. */
  ramp(level) {
    const sums = [0, 0, 0, 0];
    const tiles = this.atLevel(level);
    const stride = this.stride(tiles);
    for (const tile of tiles) {
      const step = (tile.high - tile.low) / STEPS;
      const turns = new Float64Array(1022);
      for (let d = -255; d <= 255; d++) {
        turns[2 * (d + 255)] = Math.cos(d * step);
        turns[2 * (d + 255) + 1] = Math.sin(d * step);
      }
      for (let row = 0; row < this.side - 1; row += stride) {
        for (let p = row * this.side, end = p + this.side - 1; p < end; p += stride) {
          const here = tile.levels[p];
          if (!here) continue;
          const below = tile.levels[p + this.side];
          const right = tile.levels[p + 1];
          if (below) {
            sums[0] += turns[2 * (below - here + 255)];
            sums[1] += turns[2 * (below - here + 255) + 1];
          }
          if (right) {
            sums[2] += turns[2 * (right - here + 255)];
            sums[3] += turns[2 * (right - here + 255) + 1];
          }
        }
      }
    }
    const pixel = 2 ** level;
    return [Math.atan2(sums[1], sums[0]) / pixel, Math.atan2(sums[3], sums[2]) / pixel];
  }

  /** Values between which most of the picture lies: its 1st and 99th percentile. */
  range(level, correct) {
    const tiles = this.atLevel(level);
    const values = correct.hasRamp ? this.sampled(tiles, correct) : counted(tiles, correct);
    if (!values.total) return null;
    return [values.percentile(0.01), values.percentile(0.99)];
  }

  sampled(tiles, correct) {
    const values = new Histogram();
    const stride = this.stride(tiles);
    for (const tile of tiles) {
      for (let row = 0; row < this.side; row += stride) {
        for (let column = 0; column < this.side; column += stride) {
          const stored = tile.levels[row * this.side + column];
          if (stored) values.add(correct.value(tile, stored, row, column), 1);
        }
      }
    }
    return values;
  }

  stride(tiles) {
    return Math.max(1, Math.ceil(Math.sqrt((tiles.length * this.side ** 2) / SAMPLES)));
  }

  /** A tile's pixels in colours, painted anew only if something has changed. */
  painted(tile, painter) {
    if (tile.paint === painter.token && tile.canvas) return tile.canvas;
    tile.canvas ??= new OffscreenCanvas(this.side, this.side);
    const context = tile.canvas.getContext("2d");
    const image = context.createImageData(this.side, this.side);
    painter.paint(tile, this.side, new Uint32Array(image.data.buffer));
    context.putImageData(image, 0, 0);
    tile.paint = painter.token;
    return tile.canvas;
  }
}

function valueOf(tile, stored) {
  return tile.low + ((stored - 1) * (tile.high - tile.low)) / STEPS;
}

function counted(tiles, correct) {
  const values = new Histogram();
  for (const tile of tiles) {
    for (let stored = 1; stored < 256; stored++) {
      if (tile.counts[stored]) values.add(correct.value(tile, stored, 0, 0), tile.counts[stored]);
    }
  }
  return values;
}

class Histogram {
  constructor() {
    this.values = [];
    this.total = 0;
  }

  add(value, count) {
    this.values.push([value, count]);
    this.total += count;
  }

  percentile(share) {
    this.values.sort((one, other) => one[0] - other[0]);
    let left = share * this.total;
    for (const [value, count] of this.values) {
      left -= count;
      if (left <= 0) return value;
    }
    return this.values.at(-1)[0];
  }
}

/** What is taken off a value before it is shown: of a phase the mean, and perhaps a ramp. */
export class Correction {
  constructor(isPhase, mean, slope, side) {
    this.isPhase = isPhase;
    this.mean = mean;
    this.slope = slope;
    this.side = side;
    this.hasRamp = isPhase && slope !== null;
  }

  /** At a pixel of a tile. */
  value(tile, stored, row, column) {
    const value = valueOf(tile, stored);
    if (!this.isPhase) return value;
    if (!this.hasRamp) return wrapped(value - this.mean);
    const size = 2 ** tile.level;
    const y = (tile.ty * this.side + row + 0.5) * size;
    const x = (tile.tx * this.side + column + 0.5) * size;
    return this.at(value, y, x);
  }

  /** At a canvas pixel. */
  at(value, y, x) {
    if (!this.isPhase) return value;
    if (!this.hasRamp) return wrapped(value - this.mean);
    return wrapped(value - this.mean - this.slope[0] * y - this.slope[1] * x);
  }
}

let tokens = 0;

/** Turns values into colours. Another one is made whenever anything about that changes. */
export class Painter {
  constructor(correction, low, high, map) {
    this.correction = correction;
    this.low = low;
    this.span = high - low || 1e-9;
    this.table = colours(map, COLOURS);
    this.token = ++tokens;
  }

  colourOf(value) {
    const at = Math.round(((value - this.low) / this.span) * (COLOURS - 1));
    return this.table[at < 0 ? 0 : at >= COLOURS ? COLOURS - 1 : at];
  }

  paint(tile, side, pixels) {
    const { levels } = tile;
    if (this.correction.hasRamp) {
      for (let row = 0, p = 0; row < side; row++) {
        for (let column = 0; column < side; column++, p++) {
          const stored = levels[p];
          if (stored) pixels[p] = this.colourOf(this.correction.value(tile, stored, row, column));
        }
      }
      return;
    }
    const table = new Uint32Array(256);
    for (let stored = 1; stored < 256; stored++) {
      table[stored] = this.colourOf(this.correction.value(tile, stored, 0, 0));
    }
    for (let p = 0; p < levels.length; p++) pixels[p] = table[levels[p]];
  }
}
