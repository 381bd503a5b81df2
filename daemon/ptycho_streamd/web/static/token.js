// The word that a daemon with keys asks its pages for: from the address (#token=...), which forgets
// it at once, kept by this tab, or asked for.

import { ask } from "./dialogs.js";

const KEPT = "ptycho-stream-token";
let word = new URLSearchParams(location.hash.slice(1)).get("token");
if (word) keep();
else word = kept();

function keep() {
  try {
    sessionStorage.setItem(KEPT, word);
  } catch {
    // It holds for this page then.
  }
}

function kept() {
  try {
    return sessionStorage.getItem(KEPT);
  } catch {
    return null;
  }
}

/** For the query of an address at the viewer; empty if there is none. */
export function tokenQuery() {
  return word ? `token=${encodeURIComponent(word)}` : "";
}

/** Whether a person has given one. */
export async function askForToken() {
  const answer = await ask({
    title: "A word is needed",
    text: ["This daemon asks for keys, and its pages for the word in its viewer.token_path."],
    fields: [{ name: "token", label: "Word", type: "password", required: true,
      autocomplete: "off" }],
    action: "Enter",
  });
  if (!answer) return false;
  word = answer.token.trim();
  keep();
  return true;
}
