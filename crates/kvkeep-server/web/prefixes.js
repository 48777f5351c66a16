// The tree of prefixes, as a flat list of rows that know their level. Rows are kept by their
// id: a poll changes texts in place, and neither focus nor what is open is lost. While somebody
// points at the tree or is in it, its order stands still.

import { Refused, post } from "./api.js";
import { byId, el, fillBar, say, set } from "./dom.js";
import { ago, bytes as inBytes, count, plural } from "./format.js";
import { namespaceName, tierPlace } from "./storage.js";

/** A chat's turn begins with a line that is its role alone. */
const ROLES = /(?:^|\n)(system|user|assistant)\n/g;
/** So many characters that siblings have in common are shown all the same. */
const LONG_ENOUGH = 12;
const NOTHING = "Nothing yet. The tree grows with every prompt since the start of the server; what prompts have in common becomes a branch.";
const NOT_SHARED = "No two prompts have begun alike yet.";

export class PrefixTree {
  #root = byId("tree");
  #rows = new Map();
  #prefixes = new Map();
  #children = new Map();
  #namespaces = new Map();
  #places = new Map();
  #open = new Map();
  #chosen = null;
  #changed;

  /** `changed` is called when something was pinned or removed. */
  constructor(changed) {
    this.#changed = changed;
    this.#root.addEventListener("click", (event) => this.#clicked(event));
    this.#root.addEventListener("keydown", (event) => this.#key(event));
    byId("tree-all").addEventListener("change", () => this.#changed());
    byId("pin").addEventListener("click", () => this.#togglePin());
    byId("remove").addEventListener("click", () => this.#remove());
  }

  show(all, namespaces) {
    // What a single prompt went through is shared by nobody.
    this.#namespaces = new Map(namespaces.map((namespace) => [namespace.id, namespace]));
    const wanted = (prefix) => byId("tree-all").checked || prefix.requests > 1 || prefix.pinned || prefix.id === this.#chosen;
    const prefixes = withParents(all.filter(wanted), all);
    this.#prefixes = new Map(prefixes.map((prefix) => [prefix.id, prefix]));
    const still = this.#root.contains(document.activeElement) || this.#root.matches(":hover");
    if (!still) this.#places.clear();
    for (const { id } of prefixes) if (!this.#places.has(id)) this.#places.set(id, this.#places.size);
    this.#children = Map.groupBy(prefixes, (prefix) => prefix.parent);
    for (const list of this.#children.values()) list.sort((a, b) => this.#places.get(a.id) - this.#places.get(b.id));
    if (!this.#prefixes.has(this.#chosen)) this.#chosen = null;
    this.#root.hidden = prefixes.length === 0;
    byId("tree-empty").hidden = prefixes.length > 0;
    say(byId("tree-empty"), all.length > 0 ? NOT_SHARED : NOTHING);
    byId("tree-head").hidden = prefixes.length === 0;
    say(byId("tree-count"), prefixes.length > 0 ? plural(prefixes.length, "branch", "branches") : "");
    this.#draw();
  }

  /** Puts the rows that are to be seen into the list, with as few moves as it takes. */
  #draw() {
    const focused = this.#root.contains(document.activeElement) ? document.activeElement : null;
    const shown = [];
    const level = (parent, depth) => (this.#children.get(parent) ?? []).forEach((prefix, at, all) => {
      shown.push(this.#showRow(prefix, depth, at, all));
      if (this.#isOpen(prefix.id, depth)) level(prefix.id, depth + 1);
    });
    level(null, 1);
    const kept = new Set(shown);
    for (const [id, { item }] of this.#rows) {
      if (kept.has(item)) continue;
      item.remove();
      this.#rows.delete(id);
    }
    shown.forEach((item, at) => {
      if (this.#root.children[at] !== item) this.#root.insertBefore(item, this.#root.children[at] ?? null);
    });
    this.#showChosen(shown);
    if (focused?.isConnected && document.activeElement !== focused) focused.focus({ preventScroll: true });
  }

  #isOpen(id, depth) {
    return this.#open.get(id) ?? depth === 1;
  }

  #showRow(prefix, depth, at, siblings) {
    const row = this.#rows.get(prefix.id) ?? this.#addRow(prefix.id);
    const name = depth === 1 ? this.#nameOf(prefix) : "";
    say(row.text, ownText(prefix, siblings));
    say(row.tag, name);
    row.tag.hidden = name === "";
    row.pinned.hidden = !prefix.pinned;
    say(row.tokens, count(prefix.tokens));
    say(row.requests, count(prefix.requests));
    const where = whereIs(prefix);
    fillBar(row.bar, where.parts, prefix.tokens, where.text);
    row.item.style.setProperty("--level", depth - 1);
    set(row.item, "aria-level", String(depth));
    set(row.item, "aria-posinset", String(at + 1));
    set(row.item, "aria-setsize", String(siblings.length));
    if (this.#children.has(prefix.id)) set(row.item, "aria-expanded", String(this.#isOpen(prefix.id, depth)));
    else row.item.removeAttribute("aria-expanded");
    return row.item;
  }

  #addRow(id) {
    const row = {
      text: el("span", { class: "snippet" }),
      pinned: el("span", { class: "pinned" }, "pinned"),
      tag: el("span", { class: "tag" }),
      tokens: el("span"),
      requests: el("span"),
      bar: el("span", { class: "bar", role: "img" }),
    };
    row.item = el("li", { class: "row", role: "treeitem", tabindex: "-1", "data-id": id },
      el("span", { class: "twist", "aria-hidden": "true" }),
      el("span", { class: "what" }, row.text, row.pinned, row.tag),
      el("span", { class: "number right" }, row.tokens, el("span", { class: "unseen" }, " tokens")),
      el("span", { class: "number right" }, row.requests, el("span", { class: "unseen" }, " requests")),
      row.bar);
    this.#rows.set(id, row);
    return row;
  }

  #nameOf(prefix) {
    const namespace = this.#namespaces.get(prefix.namespace);
    return namespace ? namespaceName(namespace) : prefix.tenant ?? "operator";
  }

  #toggle(id, open) {
    if (!this.#children.has(id)) return;
    this.#open.set(id, open);
    this.#draw();
  }

  #clicked(event) {
    const item = event.target.closest('[role="treeitem"]');
    if (!item) return;
    this.#choose(item.dataset.id);
    if (event.target.classList.contains("twist")) this.#toggle(item.dataset.id, item.getAttribute("aria-expanded") !== "true");
  }

  #choose(id) {
    if (!this.#rows.has(id)) return;
    this.#chosen = id;
    say(byId("detail-said"), "");
    this.#showChosen([...this.#root.children]);
    this.#rows.get(id).item.focus();
  }

  /** One row takes part in the tab order: the chosen one, or the first. */
  #showChosen(items) {
    const chosen = this.#rows.get(this.#chosen)?.item ?? null;
    for (const item of items) {
      set(item, "tabindex", item === (chosen ?? items[0]) ? "0" : "-1");
      set(item, "aria-selected", String(item === chosen));
    }
    this.#showDetail();
  }

  #key(event) {
    const item = event.target.closest('[role="treeitem"]');
    if (!item || event.ctrlKey || event.metaKey || event.altKey) return;
    const { id } = item.dataset;
    const open = item.getAttribute("aria-expanded") === "true";
    const go = (to) => to && this.#choose(to.dataset.id);
    const actions = {
      ArrowDown: () => go(item.nextElementSibling),
      ArrowUp: () => go(item.previousElementSibling),
      ArrowRight: () => (open ? go(item.nextElementSibling) : this.#toggle(id, true)),
      ArrowLeft: () => (open ? this.#toggle(id, false) : this.#choose(this.#prefixes.get(id).parent)),
      Home: () => go(this.#root.firstElementChild),
      End: () => go(this.#root.lastElementChild),
      Enter: () => this.#choose(id),
      " ": () => this.#choose(id),
      p: () => (this.#choose(id), this.#togglePin()),
      Delete: () => (this.#choose(id), this.#remove()),
    };
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  #showDetail() {
    const prefix = this.#prefixes.get(this.#chosen);
    byId("detail-text").classList.toggle("none", !prefix);
    for (const id of ["pin", "remove"]) byId(id).disabled = !prefix;
    say(byId("pin"), prefix?.pinned ? "Unpin" : "Pin");
    say(byId("detail-text"), prefix ? prefix.text.replace(/\s*\n\s*/g, " ⏎ ") : "Choose a prefix to see its text, to pin it, or to remove it.");
    say(byId("detail-facts"), prefix
      ? `Tokens ${count(prefix.first_token)} to ${count(prefix.first_token + prefix.tokens)} · ${plural(prefix.requests, "request")} · `
        + `last used ${ago(prefix.last_used_seconds)} ago · ${whereIs(prefix).text}`
      : "\u00a0");
  }

  async #togglePin() {
    const prefix = this.#prefixes.get(this.#chosen);
    if (!prefix) return;
    await this.#act(async () => {
      if (prefix.pinned) {
        await post("cache/unpin", { prefix: prefix.id });
        return "Unpinned.";
      }
      const { pinned_tokens } = await post("cache/pin", { prefix: prefix.id });
      return pinned_tokens > 0 ? `Pinned: ${plural(pinned_tokens, "token")} stay until you unpin them.` : "Nothing of it is in memory any more, so nothing was pinned.";
    });
  }

  async #remove() {
    const prefix = this.#prefixes.get(this.#chosen);
    if (!prefix || !(await confirmed(prefix, this.#behind(prefix.id)))) return;
    await this.#act(async () => {
      const { entries, bytes } = await post("cache/remove", { prefix: prefix.id });
      return `Removed: ${plural(entries, "block")}, ${inBytes(bytes)} of memory.`;
    });
    if (this.#prefixes.has(prefix.id)) return;
    this.#chosen = prefix.parent;
    this.#draw();
    if (document.activeElement === document.body) this.#root.querySelector('[tabindex="0"]')?.focus();
  }

  /** How many branches lie behind this one. */
  #behind(id) {
    const children = this.#children.get(id) ?? [];
    return children.reduce((sum, child) => sum + this.#behind(child.id), children.length);
  }

  async #act(action) {
    const said = byId("detail-said");
    try {
      say(said, await action());
    } catch (error) {
      say(said, error instanceof Refused ? error.message : "The server does not answer.");
    }
    await this.#changed();
  }
}

async function confirmed(prefix, branches) {
  const dialog = byId("ask");
  say(byId("ask-text"), snippet(prefix.text));
  say(byId("ask-facts"), `${plural(prefix.tokens, "token")}${branches > 0 ? ` and ${plural(branches, "branch", "branches")} behind them` : ""} `
    + "leave memory and disk. Nothing is lost but time: the next request that needs them computes them again.");
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
  return dialog.returnValue === "yes";
}

/** A branch is shown with those before it. */
function withParents(shown, all) {
  const known = new Map(all.map((prefix) => [prefix.id, prefix]));
  const kept = new Set();
  for (const leaf of shown) {
    for (let prefix = leaf; prefix && !kept.has(prefix.id); prefix = known.get(prefix.parent)) kept.add(prefix.id);
  }
  return all.filter((prefix) => kept.has(prefix.id));
}

/** The text of a branch from where it differs from its siblings on: a narrow row shows only its beginning. */
function ownText(prefix, siblings) {
  const text = snippet(prefix.text);
  const others = siblings.filter((one) => one !== prefix).map((one) => snippet(one.text));
  const shared = Math.max(0, ...others.map((other) => commonLength(text, other)));
  // From the beginning of the word in which they part.
  const from = text.lastIndexOf(" ", Math.min(shared, text.length - 1)) + 1;
  return from > LONG_ENOUGH && from < text.length ? `… ${text.slice(from)}` : text;
}

function commonLength(one, other) {
  let at = 0;
  while (at < one.length && one[at] === other[at]) at += 1;
  return at;
}

function snippet(text) {
  return text.replace(ROLES, " $1: ").replace(/\s+/g, " ").trim() || "(no text)";
}

/** Where its tokens lie, as parts of a bar and in words. What several tiers have is said of each, and drawn once. */
function whereIs({ tokens, tiers, cached_tokens }) {
  const ram = tiers.find((tier) => tier.name === "ram")?.tokens ?? 0;
  const away = tokens - cached_tokens;
  const places = [...tiers.map((tier) => [tier.tokens, tierPlace(tier.name)]), [away, "gone"]].filter(([n]) => n > 0);
  const say = ([n, place]) => `${n === tokens ? "all" : count(n)} ${place}`;
  return { parts: [["ram", ram], ["disk", cached_tokens - ram], ["away", away]], text: places.map(say).join(", ") };
}
