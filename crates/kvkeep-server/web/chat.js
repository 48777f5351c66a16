// A conversation with the model through the same API that everybody uses. The last chunk of a
// stream says what the cache did for it.

import { Refused, events, get } from "./api.js";
import { bar, byId, el, say } from "./dom.js";
import { count, milliseconds, plural } from "./format.js";
import { tierFrom, whatGave } from "./storage.js";

/** Enough for an answer, and a small model that does not come to an end stops. */
const MOST_TOKENS = 256;
/** The likeliest answer: the same question has the same one, warm or cold. */
const TEMPERATURE = 0;
const NEAR_END_PX = 48;

export class Chat {
  #turns = [];
  #stop = null;
  #log = byId("chat-log");
  #input = byId("message");
  #model = null;
  #refused;
  #answered;

  /** `refused` is told of a missing key, `answered` of every answer. */
  constructor({ refused, answered }) {
    [this.#refused, this.#answered] = [refused, answered];
    byId("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    // Without a keyboard there is no Shift+Enter.
    if (matchMedia("(hover: none) and (pointer: coarse)").matches) this.#input.placeholder = "Message";
    this.#input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    byId("stop").addEventListener("click", () => this.#stop?.abort());
    byId("chat-clear").addEventListener("click", () => this.#clear());
  }

  async #send() {
    const text = this.#input.value.trim();
    if (text === "" || this.#stop) return;
    const question = this.#say("you", text);
    const answer = this.#say("model", "");
    const facts = el("p", { class: "quiet number facts" }, "waiting for the first token …");
    answer.append(facts);
    this.#input.value = "";
    this.#busy(new AbortController());
    const turns = [...this.#turns, { role: "user", content: text }];
    const outcome = await this.#stream(turns, answer.querySelector(".said"), facts);
    if (outcome.text !== "") this.#turns = [...turns, { role: "assistant", content: outcome.text }];
    else if (this.#input.value === "") this.#input.value = text;
    if (outcome.text === "" && outcome.stopped) [question, answer].forEach((turn) => turn.remove());
    this.#busy(null);
    this.#follow(true);
    this.#answered();
  }

  /** Streams into `target`; what the cache did goes into `facts`. */
  async #stream(turns, target, facts) {
    const system = byId("system").value.trim();
    const messages = system === "" ? turns : [{ role: "system", content: system }, ...turns];
    const body = { messages, max_tokens: MOST_TOKENS, temperature: TEMPERATURE, stream: true, stream_options: { include_usage: true } };
    const written = target.appendChild(document.createTextNode(""));
    let last = null;
    let stopped = false;
    try {
      this.#model ??= (await get("v1/models")).data[0].id;
      for await (const event of events("v1/chat/completions", { model: this.#model, ...body }, this.#stop.signal)) {
        const follow = this.#nearEnd();
        const piece = event.choices?.[0]?.delta?.content;
        if (piece) {
          if (written.length === 0) say(facts, "answering …");
          written.appendData(piece);
        }
        if (event.usage) last = event;
        this.#follow(follow);
      }
      this.#showFacts(facts, last);
    } catch (error) {
      stopped = error.name === "AbortError";
      const said = stopped ? "stopped" : error instanceof Refused ? error.message : "The server does not answer. Send the message again when it is back.";
      facts.classList.toggle("bad", !stopped);
      say(facts, said);
      say(byId("chat-status"), said);
      if (error instanceof Refused && error.wantsKey) this.#refused(error);
    }
    return { text: written.data, stopped };
  }

  #showFacts(facts, last) {
    if (!last) {
      say(facts, "the stream ended before its figures");
      return;
    }
    const { usage, kvkeep } = last;
    const prompt = usage.prompt_tokens;
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const tiers = kvkeep?.tiers ?? [{ name: "ram", tokens: cached }];
    const given = tiers.map((tier) => `${tierFrom(tier.name)} ${count(tier.tokens)}`).join(", ");
    const words = `${count(cached)} of ${plural(prompt, "prompt token")} cached (${given})`;
    const gave = whatGave(tiers, prompt - cached);
    facts.replaceChildren(
      bar(gave.parts, prompt, gave.text),
      el("span", {}, `First token after ${milliseconds(kvkeep?.ttft_ms)} · ${words} · ${plural(usage.completion_tokens, "token")} answered`),
    );
    say(byId("chat-status"), `Answered. First token after ${milliseconds(kvkeep?.ttft_ms)}, ${words}.`);
  }

  #say(who, text) {
    byId("chat-empty").hidden = true;
    const turn = el("div", { class: `turn ${who}` }, el("h3", {}, who === "you" ? "You" : "Model"), el("p", { class: "said" }, text));
    this.#log.append(turn);
    this.#follow(true);
    return turn;
  }

  #clear() {
    this.#stop?.abort();
    this.#turns = [];
    this.#log.querySelectorAll(".turn").forEach((turn) => turn.remove());
    byId("chat-empty").hidden = false;
    byId("chat-clear").disabled = true;
    this.#input.focus();
  }

  #busy(stop) {
    this.#stop = stop;
    const hadFocus = document.activeElement === byId("stop");
    byId("send").hidden = stop !== null;
    byId("stop").hidden = stop === null;
    byId("chat-clear").disabled = stop !== null || byId("chat-empty").hidden === false;
    if (hadFocus) this.#input.focus();
  }

  #nearEnd() {
    return this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < NEAR_END_PX;
  }

  #follow(wanted) {
    if (wanted) this.#log.scrollTop = this.#log.scrollHeight;
  }
}
