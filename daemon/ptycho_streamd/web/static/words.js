// Words of the daemon as the page says them.

const STATES = {
  armed: ["armed", "is-live"],
  running: ["running", "is-live"],
  draining: ["ending", "is-live"],
  complete: ["complete", ""],
  interrupted: ["interrupted", "is-warn"],
  aborted: ["aborted", "is-warn"],
  unmatched: ["without positions", "is-warn"],
};

const VERDICTS = { good: "is-good", undecided: "is-warn" };

export const stateOf = (state) => STATES[state] ?? [state, ""];

export function verdictClass(verdict) {
  return verdict ? (VERDICTS[verdict] ?? "is-bad") : "";
}

/** What to call a scan: its sample, else the detector's name of it. */
export function nameOf(scan) {
  return scan.sample || scan.metadata?.sample || (scan.series ? `series ${scan.series}` : scan.scan_id);
}

export const QUANTITIES = {
  phase: { name: "phase", unit: "rad" },
  amplitude: { name: "amplitude", unit: "" },
  misfit: { name: "excess R", unit: "" },
  coverage: { name: "light", unit: "" },
};
