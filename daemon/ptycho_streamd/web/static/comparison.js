// What the image can be compared with: the network's own, earlier generations, snapshots, scans.

import { make } from "./elements.js";
import { time } from "./format.js";
import { nameOf } from "./words.js";

const MOST_SCANS = 50;

/** The wish that a choice of the menu stands for; the choice is text, kept in the address. */
export function wishOf(choice, scanId) {
  const [kind, ...rest] = choice.split(":");
  const value = rest.join(":");
  switch (kind) {
    case "predicted": return { scan_id: scanId, part: "predicted" };
    case "shown": return { scan_id: scanId, part: "shown" };
    case "generation": return { scan_id: scanId, generation: Number(value) };
    case "snapshot": {
      const [id, ...name] = value.split("/");
      return { scan_id: id, snapshot: name.join("/") };
    }
    case "scan": return { scan_id: value };
    default: return null;
  }
}

/** Fill the menu, keeping what is chosen. */
export function fillMenu(select, { words, part, snapshots, scans, choice }) {
  const groups = [];
  const option = (value, label) => make("option", { value }, label);
  const own = [];
  if (words?.predicted && part !== "predicted") own.push(option("predicted:", "what the network made"));
  if (part === "predicted") own.push(option("shown:", "the refined image"));
  for (const { generation, model } of words?.former ?? []) {
    own.push(option(`generation:${generation}`, `before, with ${model}`));
  }
  for (const held of snapshots) {
    if (held.problem) continue;
    own.push(option(`snapshot:${words.scan_id}/${held.name}`, `snapshot ${held.name}`));
  }
  if (own.length) groups.push(make("optgroup", { label: "This scan" }, ...own));
  const others = scans
    .filter((scan) => scan.scan_id !== words?.scan_id && scan.thumbnail)
    .slice(0, MOST_SCANS)
    .map((scan) => option(`scan:${scan.scan_id}`, `${nameOf(scan)} · ${time(scan.created_ns)}`));
  if (others.length) groups.push(make("optgroup", { label: "Other scans" }, ...others));
  const known = groups.some((group) => [...group.children].some((one) => one.value === choice));
  if (choice && !known) groups.push(option(choice, "as in the address"));
  const content = Boolean(choice) + groups.map((group) => group.outerHTML).join("");
  if (select.dataset.content !== content) {
    select.dataset.content = content;
    select.replaceChildren(option("", choice ? "Compare with nothing" : "Compare with…"), ...groups);
  }
  if (select.value !== choice) select.value = choice;
}

/** What a pane shows, in a few words, for its corner. */
export function labelOf(words, scans) {
  if (!words?.scan_id) return words?.problem ?? "";
  const listed = scans.find((scan) => scan.scan_id === words.scan_id);
  const name = nameOf(listed ?? words);
  if (words.snapshot) return `${name}: snapshot ${words.snapshot}`;
  const layer = words.layer === "refined" ? "refined" : "predicted";
  return `${name}: ${layer}, generation ${words.generation}`;
}
