// Colour maps as 65 points each, between which colours are interpolated: perceptually uniform ones,
// and a cyclic one for phases. The tables are sampled from matplotlib, which has put them into the
// public domain (CC0); cividis is that of Nunez, Anderton and Renslow (2018).

const POINTS = {
  viridis:
    "44015446075a470d6047136548186a481d6f482374482878472d7b46327e453781443b844240864045883e4989" +
    "3d4e8a3b528b39568c375b8d355f8d33638d31678e2f6b8e2e6f8e2c728e2a768e297a8e277e8e26828e25858e" +
    "23898e228d8d21918c1f948c1f988b1e9c891fa08820a38622a78525ab8228ae802db27d32b67a38b9773fbc73" +
    "46c06f4ec36b56c6675ec96267cc5c70cf577ad15184d44b8ed64598d83ea2da37addc30b8de29c2df23cde11d" +
    "d8e219e2e418ece51bf6e620fde725",
  cividis:
    "00224e00255400285b002b62002e6a0030700533711235701a386f213b6e273e6e2d416d32436d36466c3b496c" +
    "3f4c6c434e6c47516c4b546c4f576c535a6d565c6d5a5f6e5e626e61656f656870686a716c6d726f7073727374" +
    "7676767979777d7c78807f788482798885788c8878908b78938e789791779b94769f9775a39a74a79d73aba072" +
    "afa471b4a76fb8aa6ebcae6cc0b16ac4b468c8b866cdbb63d1bf61d5c25edac65bdec958e2cd54e7d150ebd44b" +
    "f0d846f5dc41f9e03afee434fee838",
  magma:
    "00000402010903031206051a0a08220e0b2b130d34180f3d1d114722115029115a2f116336106b3d0f71440f76" +
    "4a107951127c57157e5d177f641a806a1c81701f817621817c2382832681892881902a81962c809c2e7fa3307e" +
    "aa337db0357bb73779bd3977c43c75ca3e72d0416fd6456cdc4869e24d66e75263eb5760ef5d5ef2645cf56b5c" +
    "f7725cf9795dfa815ffc8961fc9065fd9869fe9f6dfea772feae77feb67cfebd82fec488fecc8ffed395fdda9c" +
    "fde2a3fde9aafcf0b2fcf7b9fcfdbf",
  twilight:
    "30143733113d3811453e115045135c4c1669511b77562284592a8f5c34995d3da15e47a75e51ad5f5ab15f64b5" +
    "606db86276ba647ebc6887be6c8fbf7297c1799fc281a6c38aaec595b5c7a0bcc9acc2ccb8c9d0c4ced4ced3d9" +
    "d7d7ddded9e1e2d9e2e1d8dddfd4d6dccecbd8c7bed5bfb1d1b6a3cfad96cca389ca9a7dc89073c5866ac27c63" +
    "bf725dbb6958b75f55b25652ac4d51a64550a03d50983550902e508727507e2250741e4f691a4d5f174a541546" +
    "4a134241123d3a113a3412382f1436",
  grey: "000000ffffff",
};

/** Maps by name, in the order of the menu. */
export const COLORMAPS = [
  ["viridis", "Viridis"],
  ["cividis", "Cividis"],
  ["magma", "Magma"],
  ["twilight", "Twilight (cyclic)"],
  ["grey", "Grey"],
];

const tables = new Map();

/** The map as `size` colours, packed as canvas pixels (ABGR in a little endian word). */
export function colours(name, size = 1024) {
  const key = `${name}/${size}`;
  if (!tables.has(key)) tables.set(key, table(POINTS[name] ?? POINTS.viridis, size));
  return tables.get(key);
}

function table(points, size) {
  const count = points.length / 6;
  const channel = (point, k) => parseInt(points.slice(6 * point + 2 * k, 6 * point + 2 * k + 2), 16);
  const packed = new Uint32Array(size);
  for (let i = 0; i < size; i++) {
    const at = (i / (size - 1)) * (count - 1);
    const low = Math.min(Math.floor(at), count - 2);
    const share = at - low;
    const [r, g, b] = [0, 1, 2].map((k) =>
      Math.round(channel(low, k) * (1 - share) + channel(low + 1, k) * share));
    packed[i] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  return packed;
}

/** A packed colour as CSS. */
export function css(packed) {
  return `rgb(${packed & 255}, ${(packed >> 8) & 255}, ${(packed >> 16) & 255})`;
}
