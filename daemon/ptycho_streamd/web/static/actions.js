// What a person can have done: each asks back first, and says what has come of it.

import { ask, toast, working } from "./dialogs.js";
import { bytes, count } from "./format.js";

const WORDS = {
  abort: "Aborting",
  cancel: "Cancelling the training",
  export: "Writing files",
  finetune: "Queueing the training",
  reprocess: "Beginning anew",
  rollback_model: "Loading the model before",
  snapshot: "Keeping the image",
  stop: "Ending the scan",
  use_model: "Loading the model",
};

export class Actions {
  /**
   * @param {Link} link
   * @param {{words: () => object, status: () => object}} now what the page shows
   */
  constructor(link, now) {
    this.link = link;
    this.now = now;
  }

  /** Have a command done and say what came of it; errors are said too. */
  async do(command, args, told) {
    const done = working(WORDS[command]);
    try {
      const result = await this.link.command(command, args);
      toast(told(result));
      return result;
    } catch (error) {
      toast(error.message, true);
      return null;
    } finally {
      done();
    }
  }

  get scanId() {
    return this.now.words()?.scan_id ?? null;
  }

  needsScan() {
    if (!this.scanId) toast("There is no scan yet.", true);
    return Boolean(this.scanId);
  }

  async snapshot() {
    if (!this.needsScan()) return;
    const words = this.now.words();
    const name = `at-${words.frames}-frames`;
    const answer = await ask({
      title: "Keep the image as it is now?",
      text: ["It is stored with the scan, with probe, figures and verdict, and can be compared with "
        + "later. It is deleted with the scan."],
      fields: [
        { name: "name", label: "Name", value: name, required: true, maxlength: 64,
          pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*", title: "letters, digits, '.', '_' and '-'" },
        { name: "force", label: "replace one of that name", type: "checkbox", value: false },
      ],
      action: "Keep it",
    });
    if (!answer) return;
    await this.do("snapshot", { ...answer, scan_id: this.scanId },
      (held) => `Snapshot ${held.name} of ${count(held.frames)} frames, ${bytes(held.bytes)}.`);
  }

  async export() {
    if (!this.needsScan()) return;
    const answer = await ask({
      title: "Write files of the image?",
      text: ["They go into the daemon's export folder, and replace those of this scan that are there."],
      fields: [
        { name: "npz", label: "NPZ: object, probe, positions, figures", type: "checkbox", value: true },
        { name: "png", label: "PNG: phase and amplitude", type: "checkbox", value: true },
      ],
      action: "Export",
    });
    const formats = Object.entries(answer ?? {}).filter(([, on]) => on).map(([format]) => format);
    if (!formats.length) return;
    await this.do("export", { scan_id: this.scanId, formats },
      (result) => `Written: ${result.paths.join(", ")}`);
  }

  async reprocess(models) {
    if (!this.needsScan()) return;
    const names = models.map((model) => [model.name, model.name + (model.in_use ? " (in use)" : "")]);
    const answer = await ask({
      title: "Make the image anew?",
      text: ["Every stored frame is reconstructed again. The present image is shown until the new "
        + "one is complete; a snapshot of it can be compared with."],
      fields: [
        { name: "model", label: "Model", type: "select", value: "",
          options: [["", "the one in use"], ...names] },
        { name: "orientation", label: "Detector turned", type: "select", value: "",
          options: [["", "as it is"], ...ORIENTATIONS] },
      ],
      action: "Make anew",
    });
    if (!answer) return;
    const { model, orientation } = answer;
    await this.do("reprocess",
      { scan_id: this.scanId, model: model || null, orientation: orientation || null },
      () => "The image is being made anew.");
  }

  async stop() {
    if (!this.needsRunning()) return;
    const answer = await ask({
      title: "End the running scan?",
      text: ["It is closed as if the detector had ended it; frames that still come are not its own."],
      action: "End scan",
    });
    if (answer) await this.do("stop", {}, () => "The scan has been ended.");
  }

  async abort() {
    if (!this.needsRunning()) return;
    const answer = await ask({
      title: "Abort the running scan?",
      text: ["It is given up. What is stored of it stays; frames that still come are not stored."],
      action: "Abort",
      danger: true,
    });
    if (answer) await this.do("abort", {}, () => "The scan has been aborted.");
  }

  needsRunning() {
    const id = this.now.status()?.running_scan_id;
    if (!id) toast("No scan is running.", true);
    return Boolean(id);
  }

  async finetune() {
    if (!this.needsScan()) return;
    const answer = await ask({
      title: "Fine-tune the model on this scan?",
      text: ["The model in use is trained on the scan's stored frames in a process of its own, while "
        + "the scan goes on. If it explains held-out frames better it is taken into use."],
      fields: [
        { name: "minutes", label: "Minutes", type: "number", value: 2, min: 0.1, max: 1440, step: "any",
          required: true },
        { name: "loss", label: "Learn from", type: "select", value: "unsupervised",
          options: [["unsupervised", "the frames alone"], ["mixed", "frames and synthetic samples"],
            ["supervised", "synthetic samples with its probe"]] },
        { name: "promote", label: "Take into use", type: "select", value: "if_better",
          options: [["if_better", "if it is better"], ["always", "in any case"], ["never", "no"]] },
        { name: "keep", label: "keep a snapshot to compare with", type: "checkbox", value: true },
      ],
      action: "Fine-tune",
    });
    if (!answer) return;
    const { keep, ...choices } = answer;
    if (keep) {
      const name = `before-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}`;
      await this.do("snapshot", { name, scan_id: this.scanId, force: false },
        () => `Snapshot ${name} was taken.`);
    }
    await this.do("finetune", { scan_ids: [this.scanId], ...choices },
      (job) => `The training of ${job.name} is queued.`);
  }

  async rollback() {
    const answer = await ask({
      title: "Go back to the model before?",
      text: ["Images go on as new generations with the model that was in use before this one."],
      action: "Roll back",
    });
    if (answer) {
      await this.do("rollback_model", {}, (done) => `In use: ${done.model}, before: ${done.was}.`);
    }
  }

  async useModel(name) {
    const answer = await ask({
      title: `Use ${name}?`,
      text: ["It is loaded and tried out first. Images go on as new generations with it."],
      action: "Use it",
    });
    if (answer) await this.do("use_model", { name }, (done) => `In use: ${done.model}.`);
  }

  async cancelJob(jobId) {
    const answer = await ask({
      title: "Cancel this training?",
      text: ["It ends without a model."],
      action: "Cancel training",
      danger: true,
    });
    if (answer) await this.do("cancel", { job_id: jobId }, () => "The training is cancelled.");
  }
}

const ORIENTATIONS = [
  ["identity", "not at all"], ["rotate90", "by 90°"], ["rotate180", "by 180°"],
  ["rotate270", "by 270°"], ["flip_y", "upside down"], ["flip_x", "left to right"],
  ["transpose", "rows for columns"], ["antitranspose", "columns for rows, reversed"],
];
