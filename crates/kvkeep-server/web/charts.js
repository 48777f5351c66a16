// Two charts in SVG, drawn anew whenever their data or their width changes. A series is one
// path: 500 requests stay a handful of elements.

import { el, svg, say, set } from "./dom.js";
import { milliseconds, percent } from "./format.js";
import { tierFrom } from "./storage.js";

const HEIGHT = 208;
const MARGIN = { top: 10, right: 2, bottom: 24, left: 52 };
/** Requests over which a hit rate is taken. */
const WINDOW = 20;
const REACH_PX = 24;

/** Time to first token: a mark for each request, on a scale of powers of ten. */
export class TtftChart {
  #frame;

  constructor(holder) {
    this.#frame = new Frame(holder, "Nothing to show yet: each request that is answered becomes a point here.");
  }

  draw(requests, range, medians) {
    const points = requests.filter((request) => request.ttft_ms !== null && request.endpoint !== "warm");
    const frame = this.#frame;
    if (!frame.begin(points, range)) return;
    const y = logScale(points.map((point) => point.ttft_ms), frame.bottom, MARGIN.top);
    y.ticks.forEach((ms) => frame.line(y.at(ms), ms < 1000 ? `${ms} ms` : `${ms / 1000} s`));
    for (const kind of ["cold", "warm"]) {
      const mine = points.filter((point) => point.cold === (kind === "cold"));
      if (!mine.length) continue;
      if (medians[kind] !== null) {
        const at = Math.min(frame.bottom, Math.max(MARGIN.top, y.at(medians[kind])));
        frame.add("path", { class: `median ${kind}`, d: `M${MARGIN.left} ${at}H${frame.right}` });
      }
      const mark = kind === "cold" ? triangle : circle;
      frame.add("path", { class: kind, d: mine.map((point) => mark(frame.x(point.at), y.at(point.ttft_ms))).join("") });
    }
    frame.end(
      points.map((point) => ({
        x: frame.x(point.at),
        y: y.at(point.ttft_ms),
        text: `${milliseconds(point.ttft_ms)}, ${percent(point.cached / point.prompt_tokens)} of ${point.prompt_tokens} tokens cached`,
      })),
      `Time to first token of ${points.length} requests. Median cold ${milliseconds(medians.cold)}, warm ${milliseconds(medians.warm)}.`,
    );
  }
}

/** Share of prompt tokens from RAM and from the disk, over the last requests before each moment. */
export class HitsChart {
  #frame;

  constructor(holder) {
    this.#frame = new Frame(holder, "Nothing to show yet: send the same long prompt twice and watch the second one.");
  }

  draw(requests, range) {
    const shares = rolling(requests.filter((request) => request.prompt_tokens > 0));
    const frame = this.#frame;
    if (!frame.begin(shares, range)) return;
    const y = (share) => frame.bottom - share * (frame.bottom - MARGIN.top);
    frame.add("rect", { class: "computed", x: MARGIN.left, y: MARGIN.top, width: frame.width, height: frame.bottom - MARGIN.top });
    frame.add("path", { class: "disk", d: steps(frame, shares, (share) => y(share.cached), frame.bottom) });
    frame.add("path", { class: "ram", d: steps(frame, shares, (share) => y(share.ram), frame.bottom) });
    [0, 0.25, 0.5, 0.75, 1].forEach((share) => frame.line(y(share), `${100 * share}%`));
    const last = shares.at(-1);
    frame.end(
      shares.map((share) => ({
        x: frame.x(share.at),
        y: y(share.cached),
        text: `${percent(share.cached)}: ${sources(share)}`,
      })),
      `Hit rate over time. Of prompt tokens of the last requests: ${sources(last)}.`,
    );
  }
}

/** Axes, the text where there is nothing, and the tip at the pointer: what both charts share. */
class Frame {
  #holder;
  #svg = svg("svg", { role: "img" });
  #empty;
  #tip = el("p", { class: "tip number", "aria-hidden": "true" });
  #spots = [];
  #hint;
  #from = 0;
  #to = 1;
  #pieces = [];

  constructor(holder, hint) {
    this.#holder = holder;
    this.#hint = hint;
    this.#empty = el("p", { class: "empty" });
    this.#tip.hidden = true;
    holder.append(this.#svg, this.#empty, this.#tip);
    holder.addEventListener("pointermove", (event) => this.#point(event));
    holder.addEventListener("pointerleave", () => (this.#tip.hidden = true));
    new ResizeObserver(() => holder.dispatchEvent(new CustomEvent("resized", { bubbles: true }))).observe(holder);
  }

  get right() {
    return this.#holder.clientWidth - MARGIN.right;
  }

  get width() {
    return Math.max(1, this.right - MARGIN.left);
  }

  get bottom() {
    return HEIGHT - MARGIN.bottom;
  }

  /** False where there is nothing to draw. */
  begin(items, range) {
    const now = Date.now();
    const shown = range === null ? items : items.filter((item) => item.at >= now - 1000 * range);
    this.#empty.hidden = shown.length > 0;
    this.#svg.toggleAttribute("hidden", shown.length === 0);
    if (shown.length === 0) {
      say(this.#empty, items.length > 0 ? "No requests in this time. Choose a longer one above." : this.#hint);
      this.#spots = [];
      return false;
    }
    this.#to = now;
    this.#from = range === null ? Math.min(now - 30_000, shown[0].at) : now - 1000 * range;
    this.#pieces = [];
    return true;
  }

  x(at) {
    return MARGIN.left + ((at - this.#from) / (this.#to - this.#from)) * this.width;
  }

  add(name, attributes, ...children) {
    this.#pieces.push(svg(name, attributes, ...children));
  }

  /** A line across, named at its left. */
  line(y, name) {
    this.add("path", { class: "grid", d: `M${MARGIN.left} ${y}H${this.right}` });
    this.add("text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, name);
  }

  end(spots, name) {
    const seconds = (this.#to - this.#from) / 1000;
    const step = niceSeconds(seconds / Math.max(2, Math.floor(this.width / 110)));
    for (let back = 0; back <= seconds; back += step) {
      const x = this.x(this.#to - 1000 * back);
      const anchor = back === 0 ? "end" : x < MARGIN.left + 20 ? "start" : "middle";
      this.add("text", { x, y: HEIGHT - 6, "text-anchor": anchor }, back === 0 ? "now" : `${exactly(back)} ago`);
    }
    const left = MARGIN.left - 4;
    const cut = svg("clipPath", { id: `${this.#holder.id}-cut` }, svg("rect", { x: left, y: 0, width: this.width + 8, height: HEIGHT }));
    const series = this.#pieces.filter((piece) => piece.localName !== "text");
    const texts = this.#pieces.filter((piece) => piece.localName === "text");
    this.#svg.setAttribute("viewBox", `0 0 ${this.#holder.clientWidth} ${HEIGHT}`);
    set(this.#svg, "aria-label", name);
    this.#svg.replaceChildren(cut, svg("g", { "clip-path": `url(#${this.#holder.id}-cut)` }, ...series), ...texts);
    this.#spots = spots.filter((spot) => spot.x >= left);
  }

  #point(event) {
    const box = this.#holder.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null;
    let reach = REACH_PX;
    for (const spot of this.#spots) {
      const distance = Math.hypot(spot.x - x, spot.y - y);
      if (distance < reach) [best, reach] = [spot, distance];
    }
    this.#tip.hidden = best === null;
    if (best === null) return;
    say(this.#tip, best.text);
    const room = this.#holder.clientWidth - this.#tip.offsetWidth;
    this.#tip.style.left = `${Math.max(0, Math.min(room, best.x - this.#tip.offsetWidth / 2))}px`;
    this.#tip.style.top = `${best.y > 48 ? best.y - 38 : best.y + 14}px`;
  }
}

function rolling(requests) {
  return requests.map((request, last) => {
    const tiers = { ram: 0 };
    const sum = { cached: 0, prompt: 0 };
    for (const one of requests.slice(Math.max(0, last + 1 - WINDOW), last + 1)) {
      for (const { name, tokens } of one.tiers) tiers[name] = (tiers[name] ?? 0) + tokens;
      sum.cached += one.cached_tokens;
      sum.prompt += one.prompt_tokens;
    }
    const shares = Object.entries(tiers).map(([name, tokens]) => [name, tokens / sum.prompt]);
    return { at: request.at, ram: tiers.ram / sum.prompt, cached: sum.cached / sum.prompt, tiers: shares };
  });
}

const sources = ({ tiers }) => tiers.map(([name, share]) => `${percent(share)} from ${tierFrom(name)}`).join(", ");

/** The area under a share that holds until the next request changes it. */
function steps(frame, shares, y, bottom) {
  const path = shares.map((share, i) => (i === 0 ? `M${frame.x(share.at)} ${bottom}V${y(share)}` : `H${frame.x(share.at)}V${y(share)}`));
  return `${path.join("")}H${frame.right}V${bottom}Z`;
}

const circle = (x, y) => `M${x - 3.5} ${y}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0`;
const triangle = (x, y) => `M${x} ${y - 4.5}l4.5 8h-9z`;

function logScale(values, bottom, top) {
  const low = Math.log10(Math.min(...values) * 0.7);
  const high = Math.log10(Math.max(...values) * 1.4);
  const at = (ms) => bottom - ((Math.log10(ms) - low) / (high - low)) * (bottom - top);
  const ticks = [];
  for (let power = Math.floor(low); power <= high; power += 1) {
    for (const factor of high - low > 3 ? [1] : [1, 3]) ticks.push(factor * 10 ** power);
  }
  return { at, ticks: ticks.filter((tick) => at(tick) <= bottom && at(tick) >= top) };
}

/** A tick's name; ticks are never rounded, or two could have the same. */
function exactly(seconds) {
  const [unit, name] = [[86_400, "d"], [3600, "h"], [60, "min"], [1, "s"]].find(([size]) => seconds % size === 0);
  return `${seconds / unit} ${name}`;
}

function niceSeconds(least) {
  const steps = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400, 172_800, 604_800];
  return steps.find((step) => step >= least) ?? Math.ceil(least / 604_800) * 604_800;
}
