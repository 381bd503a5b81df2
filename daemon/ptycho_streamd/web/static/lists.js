// The lists at the left: scans with thumbnails, models with their history, training jobs.

import { byId, make, reconcile } from "./elements.js";
import { count, duration, number, time } from "./format.js";
import { tokenQuery } from "./token.js";
import { nameOf, stateOf, verdictClass } from "./words.js";

export function showScans(scans, currentId, choose) {
  const list = byId("scan-list");
  if (!scans.length) {
    list.replaceChildren(make("p", { class: "empty" }, "No scan has been stored yet."));
    return;
  }
  const items = scans.map((scan) => [scan.scan_id, { ...scan, isCurrent: scan.scan_id === currentId }]);
  reconcile(list, items, (scan) => {
    const [state, stateClass] = stateOf(scan.state);
    const frames = scan.frames ?? scan.expected;
    const told = scan.verdict || state;
    const toldClass = scan.verdict ? verdictClass(scan.verdict) : stateClass;
    const picture = scan.thumbnail
      ? make("img", { class: "thumb", alt: "", width: 56, height: 56,
        src: `/thumbnail/${scan.scan_id}.png?v=${encodeURIComponent(scan.thumbnail)}&${tokenQuery()}` })
      : make("span", { class: "thumb" });
    return make("button", {
      type: "button", class: "scan", "aria-current": scan.isCurrent ? "true" : null,
      title: scan.reason || scan.scan_id, onclick: () => choose(scan.scan_id),
    }, picture, make("span", {},
      make("b", {}, nameOf(scan)),
      make("small", {}, `${time(scan.created_ns)} · ${frames === null ? "?" : count(frames)} frames`),
      make("small", { class: toldClass }, told)));
  });
}

/** Arrow keys move between the entries of a list. */
export function moveByKeys(list) {
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const buttons = [...list.querySelectorAll("button")];
    const next = buttons[buttons.indexOf(document.activeElement) + step];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });
}

export function showModels(models, use) {
  const list = byId("model-list");
  const sorted = [...models].sort((one, other) =>
    (other.in_use - one.in_use) || other.created.localeCompare(one.created));
  reconcile(list, sorted.map((model) => [model.name, model]), (model) => {
    const excess = model.metrics.excess ?? model.metrics.excess_in_use;
    const figures = [
      model.architecture,
      model.parent ? `from ${model.parent}` : null,
      Number.isFinite(excess) ? `excess R ${number(excess, 2)}` : null,
    ];
    return make("div", { class: model.in_use ? "model in-use" : "model" },
      make("b", { title: model.name }, model.name),
      make("small", {}, figures.filter(Boolean).join(" · ")),
      make("small", {}, model.created.slice(0, 16).replace("T", " ")),
      make("div", { class: "row" },
        model.in_use
          ? make("small", { class: "is-live" }, "in use")
          : make("button", { type: "button", onclick: () => use(model.name) }, "Use…")));
  });
}

const ENDED = new Set(["done", "failed", "cancelled"]);

export function showJobs(jobs, cancel) {
  const list = byId("job-list");
  if (!jobs.length) {
    list.replaceChildren(make("p", { class: "empty" },
      "Nothing has been trained here yet. Fine-tune a model from the list of models."));
    return;
  }
  reconcile(list, jobs.map((job) => [job.job_id, job]), (job) => {
    const isOver = ENDED.has(job.state);
    const left = job.remaining_s === null ? "" : `, ${duration(job.remaining_s)} left`;
    const loss = job.loss === null ? "" : `, loss ${number(job.loss, 3)}`;
    const outcome = job.promoted === true ? "in use since" : job.promoted === false ? "not better" : "";
    return make("div", { class: "job" },
      make("div", { class: "row" }, make("b", {}, job.name),
        make("small", { class: job.state === "failed" ? "is-bad" : isOver ? "" : "is-live" },
          [job.state, outcome].filter(Boolean).join(", "))),
      make("small", {}, `${job.kind === "finetune" ? `from ${job.parent ?? "the model in use"}` : "from nothing"}${job.automatic ? " · by itself" : ""}`),
      isOver ? null : make("progress", { max: 1, value: job.fraction,
        "aria-label": `${Math.round(100 * job.fraction)} % of the budget` }),
      make("p", {}, isOver ? job.message : `${Math.round(100 * job.fraction)} %${left}${loss}`),
      isOver ? null : make("div", { class: "row" },
        make("button", { type: "button", class: "danger", onclick: () => cancel(job.job_id) },
          "Cancel…")));
  });
}

/** Tabs as the pattern for them asks: arrow keys move, only the chosen one is in the tab order. */
export function useTabs(tabs, chosen) {
  const choose = (tab) => {
    for (const one of tabs) {
      const isChosen = one === tab;
      one.setAttribute("aria-selected", String(isChosen));
      one.tabIndex = isChosen ? 0 : -1;
      byId(one.getAttribute("aria-controls")).hidden = !isChosen;
    }
    chosen?.(tab.getAttribute("aria-controls"));
  };
  for (const tab of tabs) {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
      choose(next);
      next.focus();
    });
  }
  return choose;
}
