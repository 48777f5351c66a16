// Memory and disk: a bar for each tier with its cap, and below them what each namespace holds.

import { byId, el, fillBar, say } from "./dom.js";
import { bytes, count, percent, plural } from "./format.js";

/** What people call a namespace. */
export function namespaceName(namespace) {
  const name = namespace.tenant ?? (namespace.known ? "operator" : "unknown");
  return namespace.cache_salt || !namespace.known ? `${name} · ${namespace.id.slice(0, 6)}` : name;
}

/** What people call a tier, and where something is that it has. */
export const tierName = (name) => ({ ram: "RAM", disk: "Disk" })[name] ?? name;
export const tierFrom = (name) => ({ ram: "RAM" })[name] ?? name;
export const tierPlace = (name) => ({ ram: "in RAM", disk: "on disk" })[name] ?? `in ${name}`;

/** Tokens of a prompt by what gave them, as parts of a bar and in words. */
export function whatGave(tiers, computed) {
  const ram = tiers.find((tier) => tier.name === "ram")?.tokens ?? 0;
  const cached = tiers.reduce((sum, tier) => sum + tier.tokens, 0);
  const given = tiers.map((tier) => [tier.tokens, `from ${tierFrom(tier.name)}`]).filter(([n]) => n > 0);
  const words = [...given, [computed, "computed"]].map(([n, how], i) => `${count(n)}${i === 0 ? " tokens" : ""} ${how}`);
  return { parts: [["ram", ram], ["disk", cached - ram], ["computed", computed]], text: words.join(", ") };
}

function factsOf(tier) {
  return [
    tier.failing ? "failing: answers are computed instead, and it is tried again" : null,
    plural(tier.entries, "block"),
    tier.queued_bytes > 0 ? `${bytes(tier.queued_bytes)} waiting to be written` : null,
    `${count(tier.evictions)} evicted`,
    tier.damaged > 0 ? `${count(tier.damaged)} damaged and left out` : null,
    tier.load_bytes_per_s > 0 ? `loads at ${bytes(tier.load_bytes_per_s)}/s` : null,
    tier.saved_bytes > 0 ? `${tier.codec}: ${tier.codec_ratio.toFixed(2)}x, ${bytes(tier.saved_bytes)} saved` : null,
    tier.encrypted ? "encrypted" : null,
  ];
}

export class Storage {
  #tiers = new Map();
  #rows = new Map();
  // The tiers that the table has columns for.
  #columns = ["ram"];

  showTiers({ ram, tiers }) {
    this.#tier("RAM", "ram", ram, [
      plural(ram.entries, "block"),
      ram.held_bytes > 0 ? `${bytes(ram.held_bytes)} held` : null,
      ram.pinned_tokens > 0 ? `${plural(ram.pinned_tokens, "token")} pinned` : null,
      `${count(ram.evictions)} evicted`,
    ]);
    if (tiers.length === 0) {
      this.#tier(tierName("disk"), "disk", null, ["None: started with --no-disk. Without that, prompts stay warm over a restart."]);
    }
    for (const tier of tiers) this.#tier(tierName(tier.name), "disk", tier, factsOf(tier), tier.failing);
  }

  showNamespaces(namespaces) {
    const tiers = (namespaces[0]?.tiers ?? []).map(({ name }) => name);
    if (tiers.join() !== this.#columns.join()) this.#showColumns(tiers);
    const used = tiers.map((_, i) => namespaces.reduce((sum, one) => sum + one.tiers[i].bytes, 0));
    byId("namespaces-empty").hidden = namespaces.length > 0;
    byId("namespaces").parentElement.hidden = namespaces.length === 0;
    const kept = new Set();
    for (const namespace of namespaces) {
      kept.add(namespace.id);
      const row = this.#rows.get(namespace.id) ?? this.#addRow(namespace.id);
      say(row.children[0], namespaceName(namespace));
      row.children[0].title = namespace.known ? namespace.id : `${namespace.id}: nobody asked in it since the start`;
      namespace.tiers.forEach((tier, i) => share(row.children[i + 1], tier.bytes, used[i]));
    }
    for (const [id, row] of this.#rows) {
      if (kept.has(id)) continue;
      row.remove();
      this.#rows.delete(id);
    }
  }

  // A tier came or went: with another server behind the page.
  #showColumns(tiers) {
    this.#columns = tiers;
    for (const row of this.#rows.values()) row.remove();
    this.#rows.clear();
    const heads = ["Namespace", ...tiers.map(tierName)].map((head) => el("th", { scope: "col" }, head));
    byId("namespaces").parentElement.tHead.rows[0].replaceChildren(...heads);
  }

  #tier(name, kind, tier, facts, bad = false) {
    let parts = this.#tiers.get(name);
    if (!parts) {
      parts = { amount: el("span", { class: "number" }), bar: el("span", { class: "bar tall", role: "img" }), facts: el("p", { class: "quiet number" }) };
      this.#tiers.set(name, parts);
      byId("tiers").append(el("div", { class: "tier" }, el("p", { class: "line between" }, el("b", {}, name), parts.amount), parts.bar, parts.facts));
    }
    parts.bar.hidden = tier === null;
    if (tier) {
      const text = `${bytes(tier.used_bytes)} of ${bytes(tier.capacity_bytes)}`;
      say(parts.amount, text);
      fillBar(parts.bar, [[kind, tier.used_bytes]], tier.capacity_bytes, `${name}: ${text} used`);
    }
    parts.facts.classList.toggle("bad", bad);
    say(parts.facts, facts.filter((fact) => fact !== null).join(" · "));
  }

  #addRow(id) {
    const row = el("tr", {}, el("th", { scope: "row", class: "clip" }), ...this.#columns.map(() =>
      el("td", {}, el("span", { class: "number" }), el("span", { class: "bar", role: "img" }))));
    this.#rows.set(id, row);
    byId("namespaces").append(row);
    return row;
  }
}

function share(cell, amount, used) {
  const [text, bar] = cell.children;
  say(text, bytes(amount));
  fillBar(bar, [[cell.cellIndex === 1 ? "ram" : "disk", amount]], used, used > 0 ? `${percent(amount / used)} of what is used` : "nothing");
}
