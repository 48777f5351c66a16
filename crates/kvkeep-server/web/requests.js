// The requests that have ended, newest first. Rows are kept by their number, so that a new one
// on top moves the others and redraws none.

import { bar, byId, el, say } from "./dom.js";
import { ago, count, milliseconds, percent, plural } from "./format.js";
import { whatGave } from "./storage.js";

/** As many as the server remembers. */
const KEPT = 500;
const SHOWN = 60;
const ENDS = {
  stop: ["done", ""],
  length: ["length", "The answer reached the most tokens that were allowed."],
  cancelled: ["cancelled", "The client went away."],
  timed_out: ["timed out", "It took longer than this server allows."],
  failed: ["failed", "The server could not answer."],
};

/** What was asked, oldest first, as the charts use it too. */
export class History {
  requests = [];
  last = 0;

  add(fresh) {
    const now = Date.now();
    for (const request of fresh) {
      if (request.seq <= this.last) continue;
      this.last = request.seq;
      const cold = 2 * request.cached_tokens < request.prompt_tokens;
      this.requests.push({ ...request, at: now - 1000 * request.seconds_ago, cold });
    }
    this.requests = this.requests.slice(-KEPT);
  }

  /** After a restart the server counts from the beginning. */
  forget() {
    this.requests = [];
    this.last = 0;
  }
}

export class RequestList {
  #rows = new Map();
  #body = byId("requests");

  show(requests) {
    const shown = requests.slice(-SHOWN);
    byId("requests-empty").hidden = shown.length > 0;
    this.#body.parentElement.hidden = shown.length === 0;
    say(byId("requests-count"), shown.length > 0 ? `last ${count(shown.length)}` : "");
    const kept = new Set(shown.map((request) => request.seq));
    for (const [seq, row] of this.#rows) {
      if (kept.has(seq)) continue;
      row.remove();
      this.#rows.delete(seq);
    }
    const now = Date.now();
    for (const request of shown) {
      let row = this.#rows.get(request.seq);
      if (!row) {
        row = rowOf(request);
        this.#rows.set(request.seq, row);
        this.#body.prepend(row);
      }
      say(row.firstElementChild, ago((now - request.at) / 1000));
    }
  }
}

function rowOf(request) {
  const { prompt_tokens, cached_tokens, completion_tokens } = request;
  const gave = whatGave(request.tiers, request.computed_tokens);
  const [end, why] = ENDS[request.outcome] ?? [request.outcome, ""];
  const waited = request.queued_ms >= 1 ? `, ${milliseconds(request.queued_ms)} of it in the queue` : "";
  return el("tr", {},
    el("td", { class: "number quiet when" }),
    el("td", { class: "wide clip" }, request.tenant ?? "operator"),
    el("td", { class: "prompt" }, bar(gave.parts, prompt_tokens, gave.text)),
    el("td", { class: "number right" }, count(prompt_tokens)),
    el("td", { class: "number right" }, prompt_tokens > 0 ? percent(cached_tokens / prompt_tokens) : "–"),
    el("td", { class: "number right", title: `${milliseconds(request.ttft_ms)} to the first token${waited}; if nothing had been cached: ${milliseconds(request.ttft_if_cold_ms)}` }, milliseconds(request.ttft_ms)),
    el("td", { class: "number right wide", title: `${plural(completion_tokens, "token")} in ${milliseconds(request.total_ms)}` }, count(completion_tokens)),
    el("td", { class: `end ${request.outcome}`, title: why || null }, request.endpoint === "warm" && end === "done" ? "warmed" : end),
  );
}
