// The page: what comes from the viewer goes to the parts that show it, what people do to the viewer.

import { Actions } from "./actions.js";
import { showFrame, showNoFrame, showProbe } from "./beside.js";
import { Choices } from "./choices.js";
import { COLORMAPS } from "./colormaps.js";
import { fillMenu, labelOf, wishOf } from "./comparison.js";
import { Contrast, showReadout } from "./contrast.js";
import { toast } from "./dialogs.js";
import { byId, make, tell } from "./elements.js";
import { Course, Rates, showAlarms, showScan, showTitle, showTrust } from "./facts.js";
import { listenToKeys } from "./keys.js";
import { Link } from "./link.js";
import { moveByKeys, showJobs, showModels, showScans, useTabs } from "./lists.js";
import { Pane } from "./pane.js";
import { View } from "./view.js";
import { pathOf } from "./wire.js";

const choices = new Choices();
choices.applyTheme();

const told = { status: null, scans: [], models: [], jobs: [], snapshots: [] };
const course = new Course();
const rates = new Rates();

// -- the image -------------------------------------------------------------------------------

const panes = {};
for (const name of ["a", "b"]) {
  panes[name] = new Pane(name, (look) => link.send(look), () => imageChanged());
}
let pointed = null;
const view = new View(byId("view"), panes, { pointed: (place) => { pointed = place; readOut(); } });
view.showPath = choices.showPath;
const contrast = new Contrast((range) => {
  choices.contrast[choices.quantity] = range ?? undefined;
  applyOptions();
});

function readOut() {
  showReadout(pointed, panes, view.alignment);
}

/** What the panes are to show, as chosen. */
function lookAgain() {
  choices.keep();
  const { quantity } = choices;
  panes.a.show({ quantity, scan_id: choices.scanId, part: choices.part });
  const wish = choices.compare && wishOf(choices.compare, panes.a.words?.scan_id ?? choices.scanId);
  if (wish) panes.b.show({ quantity, part: "shown", ...wish });
  else if (panes.b.wish) panes.b.close();
  applyOptions();
  view.lookNow();
}

function applyOptions() {
  const options = { ramp: choices.ramp, map: choices.maps[choices.quantity], contrast: choices.contrast };
  panes.a.use(options);
  // Both halves are coloured alike.
  const same = panes.a.set && panes.a.quantity === choices.quantity;
  const contrastB = same ? { [choices.quantity]: panes.a.range } : choices.contrast;
  panes.b.use({ ...options, contrast: contrastB });
  showOptions();
}

let followed = "";
let fitted = "";
let changeIsDue = false;

/** Something of a pane is new; the page follows once a frame. */
function imageChanged() {
  if (changeIsDue) return;
  changeIsDue = true;
  requestAnimationFrame(() => {
    changeIsDue = false;
    showImage();
  });
}

function showImage() {
  const { a, b } = panes;
  const words = a.words;
  if (words?.scan_id && words.scan_id !== followed) newScan(words);
  // All of it once when the scan begins and once when it is over, in between with some room.
  const stage = `${followed}/${words?.final ?? false}`;
  if (view.follows) view.fit(fitted !== stage);
  if (words?.bounds_yx_px) fitted = stage;
  if (b.set && a.set && JSON.stringify(b.options.contrast[choices.quantity]) !== JSON.stringify(a.range)) {
    b.use({ ...b.options, contrast: { [choices.quantity]: a.range } });
  }
  if (a.set && !performance.getEntriesByName("first picture").length) {
    requestAnimationFrame(() => performance.mark("first picture"));
  }
  byId("nothing").hidden = Boolean(a.set);
  if (!a.set) tell(byId("nothing"), nothingWords(words));
  showTitle(words, told.scans);
  showTrust(words);
  showScan(words);
  course.add(words);
  course.draw();
  showOptions();
  const align = view.comparing && view.alignment.centred ? " (laid middle on middle)" : "";
  byId("label-a").hidden = byId("label-b").hidden = !view.comparing;
  tell(byId("label-a"), labelOf(words, told.scans));
  tell(byId("label-b"), labelOf(b.words, told.scans) + align);
  readOut();
  view.draw();
}

function nothingWords(words) {
  if (words?.problem) return words.problem;
  if (choices.quantity === "misfit" && words?.scan_id) {
    return "No frame of this image has been compared with it yet.";
  }
  return link.socket ? "There is no image yet. It begins with the first frame that has a position."
    : "Connecting to the daemon…";
}

/** Another scan is shown: its history, its snapshots, all of it in view. */
async function newScan(words) {
  followed = words.scan_id;
  view.follows = true;
  view.path = null;
  course.clear();
  showScans(told.scans, followed, chooseScan);
  const scanId = words.scan_id;
  const known = await ask("history", { scan_id: scanId, limit: 600 });
  if (known && followed === scanId) course.begin(scanId, known.entries);
  await readSnapshots();
  if (choices.compare) lookAgain();
  imageChanged();
}

async function readSnapshots() {
  const scanId = followed;
  const found = await ask("snapshots", { scan_id: scanId });
  if (found && followed === scanId) told.snapshots = found;
  showOptions();
}

/** A question that nobody has asked for: without an answer the page goes on. */
async function ask(command, args) {
  try {
    return await link.command(command, args);
  } catch (error) {
    if (error.code && error.code !== "not_found") toast(error.message, true);
    return null;
  }
}

// -- controls --------------------------------------------------------------------------------

function press(id, isPressed) {
  byId(id).setAttribute("aria-pressed", String(isPressed));
}

function showOptions() {
  const { a } = panes;
  for (const button of byId("quantities").children) {
    button.setAttribute("aria-pressed", String(button.dataset.quantity === choices.quantity));
  }
  const canChoose = Boolean(a.words?.predicted) || choices.part === "predicted";
  for (const button of byId("parts").children) {
    button.setAttribute("aria-pressed", String(canChoose
      ? button.dataset.part === choices.part : button.dataset.part === "predicted"));
    button.disabled = !canChoose;
  }
  press("ramp", choices.ramp);
  byId("ramp").disabled = choices.quantity !== "phase";
  press("path", view.showPath);
  press("follow", choices.scanId === null);
  byId("colormap").value = choices.maps[choices.quantity];
  const isAuto = !choices.contrast[choices.quantity];
  contrast.show(choices.quantity, a.set ? a.range : [0, 1], isAuto, choices.maps[choices.quantity]);
  fillMenu(byId("compare"), { words: a.words, part: choices.part, snapshots: told.snapshots,
    scans: told.scans, choice: choices.compare });
  const running = Boolean(told.status?.running_scan_id);
  byId("stop").disabled = byId("abort").disabled = !running;
  for (const id of ["snapshot", "export", "reprocess", "finetune"]) {
    byId(id).disabled = !a.words?.scan_id;
  }
}

function chooseQuantity(quantity) {
  choices.quantity = quantity;
  lookAgain();
}

function choosePart(part) {
  choices.part = part;
  if (choices.compare === "predicted:" || choices.compare === "shown:") choices.compare = "";
  lookAgain();
}

function chooseScan(scanId) {
  if (scanId !== null && scanId === followed && scanId !== choices.scanId) {
    choices.scanId = scanId; // it is shown already, and stays from now on
  } else choices.scanId = scanId;
  choices.part = "shown";
  if (!choices.compare.startsWith("scan:")) choices.compare = "";
  if (choices.compare === `scan:${scanId}`) choices.compare = "";
  told.snapshots = [];
  lookAgain();
}

function stepScan(step) {
  const index = told.scans.findIndex((scan) => scan.scan_id === followed);
  const next = told.scans[index + step];
  if (next) chooseScan(next.scan_id);
}

function compareWith(choice) {
  choices.compare = choice;
  lookAgain();
}

/** The first thing to compare with, or nothing again. */
function toggleComparison() {
  if (choices.compare) compareWith("");
  else {
    const first = [...byId("compare").querySelectorAll("option")].find((option) => option.value);
    if (first) compareWith(first.value);
    else toast("There is nothing to compare with yet.");
  }
}

function toggleRamp() {
  choices.ramp = !choices.ramp;
  choices.keep();
  applyOptions();
}

function togglePath() {
  view.showPath = choices.showPath = !view.showPath;
  choices.keep();
  watch();
  showOptions();
  view.draw();
}

function nextTheme() {
  choices.theme = document.documentElement.dataset.theme === "light" ? "dark" : "light";
  choices.keep();
  choices.applyTheme();
  view.draw();
}

/** What is shown beside the image. */
function watch() {
  const number = byId("frame-number").value;
  link.send({
    type: "watch",
    frame: true,
    frame_number: number === "" ? null : Math.max(0, Math.trunc(Number(number))),
    frame_look: byId("frame-look").value,
    probe: true,
    path: view.showPath,
  });
}

const chooseTab = useTabs([byId("tab-scans"), byId("tab-models"), byId("tab-jobs")]);

// -- what comes ------------------------------------------------------------------------------

const link = new Link({
  open() {
    told.scans = [];
    tell(byId("link"), "live", "link is-good");
    for (const pane of Object.values(panes)) pane.tell();
    watch();
  },
  closed(reason) {
    tell(byId("link"), reason || "connecting again", "link is-warn");
  },
  hello(head) {
    if (window.viewerVersion && window.viewerVersion !== head.version) location.reload();
    window.viewerVersion = head.version;
  },
  status({ value }) {
    told.status = value;
    rates.take(value);
    rates.draw(value);
    showAlarms(value.alarms);
    showOptions();
  },
  scans({ changed, order }) {
    const known = new Map([...told.scans, ...changed].map((scan) => [scan.scan_id, scan]));
    told.scans = (order ?? told.scans.map((scan) => scan.scan_id)).map((id) => known.get(id));
    showScans(told.scans, followed, chooseScan);
    imageChanged();
  },
  models({ value }) {
    told.models = value;
    showModels(value, (name) => actions.useModel(name));
  },
  jobs({ value }) {
    told.jobs = value;
    showJobs(value, (jobId) => actions.cancelJob(jobId));
  },
  picture(head) {
    panes[head.pane].onPicture(head);
  },
  tiles(head, bytes) {
    panes[head.pane].onTiles(head, bytes);
  },
  path(head, bytes) {
    if (head.stream !== panes.a.stream) return;
    view.path = pathOf(head, bytes, head.fresh ? [] : (view.path ?? []));
    view.draw();
  },
  frame: showFrame,
  no_frame: ({ reason }) => showNoFrame(reason),
  probe: showProbe,
});

const actions = new Actions(link, { words: () => panes.a.words, status: () => told.status });

// -- what people do --------------------------------------------------------------------------

for (const [value, label] of COLORMAPS) byId("colormap").append(make("option", { value }, label));
byId("colormap").addEventListener("change", (event) => {
  choices.maps[choices.quantity] = event.target.value;
  choices.keep();
  applyOptions();
});
for (const button of byId("quantities").children) {
  button.addEventListener("click", () => chooseQuantity(button.dataset.quantity));
}
for (const button of byId("parts").children) {
  button.addEventListener("click", () => choosePart(button.dataset.part));
}
byId("compare").addEventListener("change", (event) => compareWith(event.target.value));
for (const id of ["frame-number", "frame-look"]) byId(id).addEventListener("change", watch);
moveByKeys(byId("scan-list"));

const doings = {
  follow: () => chooseScan(null),
  ramp: toggleRamp,
  path: togglePath,
  theme: nextTheme,
  "zoom-in": () => view.zoomBy(1.4),
  "zoom-out": () => view.zoomBy(1 / 1.4),
  "zoom-fit": () => view.fitAll(),
  snapshot: async () => { await actions.snapshot(); await readSnapshots(); },
  export: () => actions.export(),
  reprocess: () => actions.reprocess(told.models),
  stop: () => actions.stop(),
  abort: () => actions.abort(),
  finetune: async () => { await actions.finetune(); await readSnapshots(); },
  rollback: () => actions.rollback(),
};
for (const [id, action] of Object.entries(doings)) byId(id).addEventListener("click", action);

listenToKeys(byId("help"), {
  1: () => chooseQuantity("phase"),
  2: () => chooseQuantity("amplitude"),
  3: () => chooseQuantity("misfit"),
  4: () => chooseQuantity("coverage"),
  p: () => { if (!byId("parts").firstElementChild.disabled) choosePart(choices.part === "shown" ? "predicted" : "shown"); },
  c: toggleComparison,
  "[": () => view.divide(view.divider - 0.05),
  "]": () => view.divide(view.divider + 0.05),
  r: () => { if (choices.quantity === "phase") toggleRamp(); },
  w: togglePath,
  a: () => contrast.chosen(null),
  "+": doings["zoom-in"],
  "=": doings["zoom-in"],
  "-": doings["zoom-out"],
  0: doings["zoom-fit"],
  l: doings.follow,
  j: () => stepScan(1),
  k: () => stepScan(-1),
  s: doings.snapshot,
  e: doings.export,
  m: () => { chooseTab(byId("tab-models")); doings.finetune(); },
  x: () => { if (!byId("abort").disabled) doings.abort(); },
  t: nextTheme,
});

matchMedia("(prefers-color-scheme: light)").addEventListener("change", () => {
  choices.applyTheme();
  view.draw();
});

lookAgain();
