// What is said of the scan and of the daemon: title, trust, rates, alarms, metadata, curves.

import { chart } from "./charts.js";
import { byId, make, pairs, reconcile, tell } from "./elements.js";
import { count, length, milliseconds, number, share, time } from "./format.js";
import { nameOf, stateOf, verdictClass } from "./words.js";

const RATE_S = 180;

/** What is wrong at the top of the page; what is only worth knowing beside the rates. */
export function showAlarms(told) {
  const notes = told.filter((alarm) => alarm.level === "note");
  reconcile(byId("notes"), notes.map((note) => [note.title, note]), (note) =>
    make("li", { title: note.reason }, note.title));
  const alarms = told.filter((alarm) => alarm.level !== "note");
  const items = alarms.map((alarm) => [`${alarm.level}/${alarm.title}`, alarm]);
  reconcile(byId("alarms"), items, (alarm) => make("div", { class: `alarm ${alarm.level}` },
    make("strong", {}, alarm.title), make("span", {}, alarm.reason)));
}

export function showTitle(words, scans) {
  const listed = scans.find((scan) => scan.scan_id === words?.scan_id);
  const [title, state, verdict] = [byId("title"), byId("state"), byId("verdict")];
  if (!words?.scan_id) {
    tell(title, "Waiting for a scan");
    state.hidden = verdict.hidden = byId("progress").hidden = true;
    document.title = "ptycho-stream";
    return;
  }
  const name = nameOf(listed ?? words);
  tell(title, listed ? `${name} · ${time(listed.created_ns)}` : name);
  const [stateWords, stateClass] = stateOf(words.state);
  state.hidden = false;
  tell(state, stateWords, `pill ${stateClass}`);
  verdict.hidden = !words.verdict;
  tell(verdict, words.verdict ?? "", `pill ${verdictClass(words.verdict)}`);
  const expected = words.counts.expected ?? listed?.expected;
  byId("progress").hidden = false;
  const bar = byId("progress-bar");
  bar.hidden = !expected;
  bar.max = expected ?? 1;
  bar.value = words.frames;
  tell(byId("progress-text"),
    expected ? `${count(words.frames)} of ${count(expected)} frames` : `${count(words.frames)} frames`);
  document.title = `${name}: ${words.frames} frames`;
}

export function showTrust(words) {
  const reasons = words?.reasons ?? [];
  const list = byId("reasons");
  const told = words?.collapsed
    ? ["the network's output has collapsed: do not believe the image", ...reasons]
    : reasons.length ? reasons : [words?.verdict ? words.verdict : "not looked at yet"];
  const kind = words?.collapsed ? "is-bad" : verdictClass(words?.verdict) || "is-soft";
  reconcile(list, told.map((reason) => [reason, [reason, kind]]), ([reason]) =>
    make("li", { class: kind }, make("span", {}, reason)));
  const figures = words?.trust ?? {};
  const has = (name) => name in figures;
  pairs(byId("trust"), [
    ["Misfit R", has("r_factor") ? number(figures.r_factor) : "–"],
    ["of noise alone", has("r_poisson") ? number(figures.r_poisson) : "–"],
    ["Held-out R", has("r_free") ? number(figures.r_free) : null],
    ["Resolution", has("resolution_nm") ? `${number(figures.resolution_nm)} nm` : "–"],
    ["Covered", has("coverage_um2") ? `${number(figures.coverage_um2)} µm²` : "–"],
    ["Overlap", has("overlap") ? `${number(figures.overlap, 2)} probes a spot` : "–"],
    ["Bad frames", has("bad_share") ? share(figures.bad_share) : null],
  ]);
}

export function showScan(words) {
  if (!words?.scan_id) {
    byId("metadata").replaceChildren();
    return;
  }
  const missing = words.counts.missing || null;
  pairs(byId("metadata"), [
    ["Layer", words.layer === "refined" ? `refined, ${number(words.sweeps, 2)} sweeps` : words.layer],
    ["Model", words.model],
    ["Generation", String(words.generation)],
    ["Pixel", length(words.pixel_yx_m[0])],
    ["Missing", missing === null ? null : `${count(missing)} frames`],
    ["Scan", words.scan_id],
    ...Object.entries(words.metadata),
  ]);
}

/** Rates as they are told, and how they were over the last minutes. */
export class Rates {
  constructor() {
    this.received = [];
    this.shown = [];
  }

  take(status) {
    const now = performance.now() / 1000;
    if (status.state !== "silent") {
      this.received.push([now, status.received_per_s]);
      this.shown.push([now, status.reconstructed_per_s]);
    }
    for (const points of [this.received, this.shown]) {
      while (points.length && now - points[0][0] > RATE_S) points.shift();
    }
  }

  draw(status) {
    const known = status && status.state !== "silent";
    pairs(byId("rates"), [
      ["Received", known ? `${number(status.received_per_s, 3)} frames/s` : "–"],
      ["In the image", known ? `${number(status.reconstructed_per_s, 3)} frames/s` : "–"],
      ["Backlog", known ? `${count(status.backlog_frames)} frames` : "–"],
      ["Latency", known
        ? `${milliseconds(status.latency_p50_ms)}, 99 %: ${milliseconds(status.latency_p99_ms)}` : "–"],
      ["Model", known ? (status.model ?? "loading") : "–"],
      ["Training", known ? trainingWords(status) : "–"],
    ]);
    chart(byId("chart-rate"), [this.received, this.shown], { fromZero: true, ago: true, least: 1 });
  }
}

function trainingWords(status) {
  const job = status.training;
  if (!job) return status.queued ? `${status.queued} wait` : "none";
  return `${job.name}: ${Math.round(100 * job.fraction)} %`;
}

/** How a scan's figures have come about: what the store has of it, and what has come since. */
export class Course {
  constructor() {
    this.clear();
  }

  clear() {
    this.scanId = null;
    this.points = [];
    this.last = "";
  }

  /** Take the history of a scan, as the command of that name tells it. */
  begin(scanId, entries) {
    this.scanId = scanId;
    this.points = entries.map((entry) => ({ at: entry.time_ns / 1e9, ...entry.figures }));
    this.last = JSON.stringify(entries.at(-1)?.figures ?? null);
  }

  add(words) {
    if (words?.scan_id !== this.scanId || !words.live || !("r_factor" in words.trust)) return;
    const now = JSON.stringify(words.trust);
    if (now === this.last) return;
    this.last = now;
    this.points.push({ at: Date.now() / 1000, ...words.trust });
  }

  draw() {
    const line = (name) => this.points
      .filter((point) => name in point)
      .map((point) => [point.at, point[name]]);
    chart(byId("chart-r"), [line("r_factor"), line("r_poisson")], {});
    chart(byId("chart-resolution"), [line("resolution_nm")], {});
  }
}
