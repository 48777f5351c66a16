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
export const tierPlace = (name) => ({ ram: "in RAM", disk: "on disk" })[name] ?? `in ${name}`;

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
    const largest = (tier) => namespaces.reduce((sum, one) => sum + one[tier].bytes, 0);
    const used = { ram: largest("ram"), disk: largest("disk") };
    byId("namespaces-empty").hidden = namespaces.length > 0;
    byId("namespaces").parentElement.hidden = namespaces.length === 0;
    const kept = new Set();
    for (const namespace of namespaces) {
      kept.add(namespace.id);
      const row = this.#rows.get(namespace.id) ?? this.#addRow(namespace.id);
      say(row.children[0], namespaceName(namespace));
      row.children[0].title = namespace.known ? namespace.id : `${namespace.id}: nobody asked in it since the start`;
      ["ram", "disk"].forEach((tier, i) => share(row.children[i + 1], tier, namespace[tier].bytes, used[tier]));
    }
    for (const [id, row] of this.#rows) {
      if (kept.has(id)) continue;
      row.remove();
      this.#rows.delete(id);
    }
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
    const row = el("tr", {}, el("th", { scope: "row", class: "clip" }), ...["ram", "disk"].map((kind) =>
      el("td", {}, el("span", { class: "number" }), el("span", { class: "bar", role: "img" }, el("i", { class: kind })))));
    this.#rows.set(id, row);
    byId("namespaces").append(row);
    return row;
  }
}

function share(cell, kind, amount, used) {
  const [text, bar] = cell.children;
  say(text, bytes(amount));
  fillBar(bar, [[kind, amount]], used, used > 0 ? `${percent(amount / used)} of what is used` : "nothing");
}
