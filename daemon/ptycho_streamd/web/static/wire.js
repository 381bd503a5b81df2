// Binary messages: a length, a JSON head, and a deflated payload.

const TILE_RECORD_BYTES = 20;

/** Head and payload of a message. */
export async function decode(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const deflated = new Blob([new Uint8Array(buffer, 4 + length)]).stream();
  const plain = deflated.pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(plain).arrayBuffer());
  return { head, bytes };
}

/** The tiles in a payload: place, range, and levels as they were encoded. */
export function* tilesOf(head, bytes) {
  const table = new DataView(bytes.buffer, bytes.byteOffset, head.count * TILE_RECORD_BYTES);
  const pixels = head.side * head.side;
  for (let i = 0; i < head.count; i++) {
    const at = i * TILE_RECORD_BYTES;
    const from = head.count * TILE_RECORD_BYTES + i * pixels;
    yield {
      ty: table.getInt32(at, true),
      tx: table.getInt32(at + 4, true),
      low: table.getFloat32(at + 8, true),
      high: table.getFloat32(at + 12, true),
      level: table.getUint16(at + 16, true),
      isDifference: table.getUint16(at + 18, true) === 1,
      steps: bytes.subarray(from, from + pixels),
    };
  }
}

/** Places [y, x, number] of frames, those known and those in a payload, as they were taken. */
export function pathOf(head, bytes, known) {
  const places = new DataView(bytes.buffer, bytes.byteOffset);
  const added = Array.from({ length: head.count }, (_, i) => [
    places.getFloat32(8 * i, true),
    places.getFloat32(8 * i + 4, true),
    places.getUint32(8 * head.count + 4 * i, true),
  ]);
  return [...known, ...added].sort((one, other) => one[2] - other[2]);
}

/** Levels of a tile from its differences to a former version of it, or to its neighbours. */
export function levelsOf(tile, side, former) {
  const levels = new Uint8Array(side * side);
  const { steps } = tile;
  if (tile.isDifference) {
    for (let p = 0; p < levels.length; p++) levels[p] = former[p] + steps[p];
    return levels;
  }
  for (let row = 0; row < side; row++) {
    let p = row * side;
    levels[p] = steps[p] + (row ? levels[p - side] : 0);
    for (const end = p + side; ++p < end;) levels[p] = levels[p - 1] + steps[p];
  }
  return levels;
}
