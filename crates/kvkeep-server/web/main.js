// One poll a second while the page is seen: figures and new requests each time, the tree and
// the namespaces when something was served, and now and then because blocks are also evicted.
//
// The server may go and come back, start anew, or ask for a key. Each of these is said once,
// and the page goes on by itself.

import { Gone, Refused, apiKey, get } from "./api.js";
import { HitsChart, TtftChart } from "./charts.js";
import { Chat } from "./chat.js";
import { byId, say } from "./dom.js";
import { count, milliseconds, percent, span, times } from "./format.js";
import { PrefixTree } from "./prefixes.js";
import { History, RequestList } from "./requests.js";
import { Storage, tierFrom } from "./storage.js";

const POLL_MS = 1000;
const LONGEST_PAUSE_MS = 5000;
/** Polls after which the tree is asked for even if nothing was served. */
const TREE_EVERY = 5;

const history = new History();
const requestList = new RequestList();
const storage = new Storage();
const ttftChart = new TtftChart(byId("ttft-chart"));
const hitsChart = new HitsChart(byId("hits-chart"));
const tree = new PrefixTree(() => showTree().catch(failed));

let stats = null;
let answeredAt = null;
let failures = 0;
let polls = 0;
let timer = null;
let polling = false;
let waitsForKey = false;

async function poll() {
  if (polling || waitsForKey || document.hidden) return;
  polling = true;
  clearTimeout(timer);
  try {
    const known = stats;
    const [now, { requests }] = await Promise.all([get("cache/stats"), get(`cache/requests?after=${history.last}&limit=500`)]);
    if (known && now.uptime_seconds < known.uptime_seconds) {
      forget();
      timer = setTimeout(poll, 0);
      return;
    }
    stats = now;
    history.add(requests);
    if (requests.length > 0 || polls % TREE_EVERY === 0 || failures > 0) await showTree();
    polls += 1;
    [failures, answeredAt] = [0, new Date()];
    show();
    timer = setTimeout(poll, POLL_MS);
  } catch (error) {
    failed(error);
  } finally {
    polling = false;
  }
}

async function showTree() {
  const [{ prefixes }, { namespaces }] = await Promise.all([get("cache/prefixes?limit=200"), get("cache/namespaces")]);
  storage.showNamespaces(namespaces);
  tree.show(prefixes, namespaces);
}

function show() {
  connection("live", "live");
  byId("gone").hidden = true;
  byId("change-key").hidden = apiKey.get() === "";
  say(byId("model"), stats.model);
  say(byId("uptime"), `up ${span(stats.uptime_seconds, 0)}`);
  showFigures();
  storage.showTiers(stats);
  requestList.show(history.requests);
  draw();
}

function showFigures() {
  const { tokens, requests, ttft_ms: { total, total_if_cold: ifCold } } = stats;
  const some = tokens.requested > 0;
  const given = tokens.tiers.map((tier) => `${tierFrom(tier.name)} ${count(tier.tokens)}`).join(", ");
  say(byId("hit-rate"), some ? percent(stats.token_hit_rate) : "–");
  say(byId("hit-rate-of"), some ? `${given} of ${count(tokens.requested)}` : "no prompt yet");
  say(byId("saved"), some ? span(stats.prefill_seconds_saved) : "–");
  say(byId("saved-of"), some ? `${count(tokens.requested - tokens.computed)} tokens not computed again` : "of computing, since the start");
  say(byId("ratio"), total > 0 ? `${times(ifCold / total)} sooner` : "–");
  say(byId("ratio-of"), total > 0 ? `${span(total / 1000)} in all, ${span(ifCold / 1000)} if all were cold` : "no answer yet");
  say(byId("running"), `${count(requests.running)} running`);
  say(byId("served"), `${count(requests.queued)} waiting · ${count(requests.served)} served${requests.failed > 0 ? ` · ${count(requests.failed)} failed` : ""}`
    + `${requests.rejected > 0 ? ` · ${count(requests.rejected)} turned away` : ""}`);
}

function draw() {
  if (!stats) return;
  const { cold, warm } = stats.ttft_ms;
  const medians = { cold: cold.count > 0 ? cold.p50 : null, warm: warm.count > 0 ? warm.p50 : null };
  say(byId("cold-median"), medians.cold === null ? "" : milliseconds(medians.cold));
  say(byId("warm-median"), medians.warm === null ? "" : milliseconds(medians.warm));
  const chosen = document.querySelector("input[name=range]:checked").value;
  const range = chosen === "all" ? null : Number(chosen);
  ttftChart.draw(history.requests, range, medians);
  hitsChart.draw(history.requests, range);
}

function failed(error) {
  if (error instanceof Refused && error.wantsKey) {
    askForKey(error);
    return;
  }
  failures += 1;
  clearTimeout(timer);
  timer = setTimeout(poll, Math.min(LONGEST_PAUSE_MS, POLL_MS * failures));
  if (!(error instanceof Gone || error instanceof Refused)) throw error;
  const since = answeredAt ? ` The figures below are from ${answeredAt.toLocaleTimeString()}.` : "";
  connection("gone", "no answer");
  say(byId("gone"), error instanceof Gone
    ? `The server at ${location.host} does not answer. This page asks again until it is back.${since}`
    : `The server answers with an error: ${error.message}.${since}`);
  byId("gone").hidden = false;
}

function connection(state, text) {
  byId("state").dataset.state = state;
  say(byId("state-text"), text);
  byId("main").classList.toggle("old", state !== "live");
}

function askForKey(error) {
  const had = apiKey.get() !== "";
  waitsForKey = true;
  connection("key", "needs a key");
  byId("gone").hidden = true;
  openKeyForm(error.status === 403
    ? "This key may chat, but not see the cache: give the operator's."
    : had ? "The server does not know this key. Give another one." : "This server asks for an API key.");
}

function openKeyForm(text) {
  say(byId("key-label"), text);
  byId("forget-key").hidden = apiKey.get() === "";
  byId("key-form").hidden = false;
  byId("key").value = "";
  byId("key").focus();
}

function useKey(key) {
  apiKey.set(key);
  waitsForKey = false;
  byId("key-form").hidden = true;
  byId("key").value = "";
  forget();
  poll();
}

/** What is shown belongs to another run of the server, or to nobody. */
function forget() {
  history.forget();
  stats = null;
  polls = 0;
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
});
byId("forget-key").addEventListener("click", () => useKey(""));
byId("change-key").addEventListener("click", () => openKeyForm("Another API key"));
byId("range").addEventListener("change", draw);
document.addEventListener("resized", draw);
document.addEventListener("visibilitychange", poll);
new Chat({ refused: askForKey, answered: poll });
for (const base of document.querySelectorAll(".base")) base.textContent = new URL("v1", document.baseURI).href;
poll();
