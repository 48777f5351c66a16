// The dashboard in Chromium, over the real server and the real model. Nothing is mocked:
// what a test sees on the page it also asks of the API.
//
//   KVKEEP=target/release/kvkeep node --test dashboard.test.js

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { after, before, test } from "node:test";

import { launch, live, open } from "./browser.js";
import { Server } from "./server.js";

const BINARY = process.env.KVKEEP;
const DOCUMENT = await readFile(new URL("../../crates/kvkeep-cli/texts/ownership.txt", import.meta.url), "utf8");
const SYSTEM = `Answer from this text, shortly.\n\n${DOCUMENT.slice(0, 2400)}`;
const AXE = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const PHONE = { viewport: { width: 390, height: 844 }, hasTouch: true, isMobile: true };

const about = (question) => [{ role: "system", content: SYSTEM }, { role: "user", content: question }];
const chosen = (page) => page.locator('[role="treeitem"][aria-selected="true"]');
const prefixesOf = async (server) => (await server.get("cache/prefixes?limit=500")).prefixes;

let browser;
let server;

before(async () => {
  assert.ok(BINARY, "KVKEEP names the binary");
  [browser, server] = await Promise.all([launch(), Server.inNewFolder(BINARY)]);
  await server.start(["--ram-gib", "0.5"]);
});

after(async () => {
  await browser?.close();
  await server?.end();
});

/** Runs `steps` on a fresh page, and fails if the page complained. */
async function onPage(steps, { allowed = null, of = server, ...options } = {}) {
  const { page, complaints, close } = await open(browser, of.url, options);
  try {
    await steps(page);
    assert.deepEqual(complaints.filter((complaint) => !allowed?.test(complaint)), []);
  } finally {
    await close();
  }
}

test("every file says that nothing may come from elsewhere, and that nobody may frame it", async () => {
  const page = await (await fetch(server.url)).text();
  const files = [...page.matchAll(/(?:src|href)="(dashboard\/[^"]+)"/g)].map((match) => match[1]);
  assert.ok(files.length >= 4);
  for (const file of ["", ...files]) {
    const { headers, ok } = await fetch(server.url + file);
    assert.ok(ok, file);
    const policy = headers.get("content-security-policy");
    for (const part of ["default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"]) {
      assert.ok(policy.includes(part), `${file}: ${part}`);
    }
    assert.equal(headers.get("x-content-type-options"), "nosniff");
    assert.equal(headers.get("referrer-policy"), "no-referrer");
  }
});

test("an empty server says what to do", () => onPage(async (page) => {
  await live(page);
  for (const id of ["requests-empty", "tree-empty", "chat-empty"]) assert.ok(await page.locator(`#${id}`).isVisible(), id);
  assert.match(await page.locator("#ttft-chart").innerText(), /each request/);
  assert.equal(await page.locator("#model").innerText(), (await server.get("cache/stats")).model);
}));

test("a request made elsewhere appears without a reload, in figures, charts, list and tree", () => onPage(async (page) => {
  await live(page);
  await page.evaluate(() => (window.notReloaded = true));
  await server.chat(about("What is ownership in Rust?"));
  await server.chat(about("What is stored on the stack?"));
  await page.waitForFunction(() => document.querySelectorAll("#requests tr").length === 2);
  const { requests } = await server.get("cache/requests");
  const newest = page.locator("#requests tr").first();
  assert.ok(requests[1].cached_tokens > 0.8 * requests[1].prompt_tokens, "the second prompt was found");
  assert.match(await newest.locator(".bar").getAttribute("aria-label"), new RegExp(`^${requests[1].cached_tokens.toLocaleString("en")} tokens from RAM, [0-9]+ computed`));
  assert.match(await newest.innerText(), new RegExp(requests[1].prompt_tokens.toLocaleString("en")));
  await page.waitForSelector('[role="treeitem"]');
  assert.equal(await page.locator('[role="treeitem"][aria-level="1"]').count(), 1, "what both share is one branch");
  assert.match(await page.locator('[role="treeitem"]').first().textContent(), /2 requests/);
  assert.match(await page.locator("#ttft-chart svg").getAttribute("aria-label"), /2 requests\. Median cold [\d.,]+ m?s, warm [\d.,]+ m?s/);
  assert.equal(await page.locator("#ttft-chart path.cold:not(.median)").count(), 1);
  assert.equal(await page.locator("#ttft-chart path.warm:not(.median)").count(), 1);
  assert.match(await page.locator("#ratio").innerText(), /^[\d.,]+× sooner$/);
  const stats = await server.get("cache/stats");
  assert.equal(await page.locator("#hit-rate").innerText(), `${(100 * stats.token_hit_rate).toFixed(1)}%`);
  assert.ok(await page.evaluate(() => window.notReloaded));
}));

test("an answer streams, and the next turn finds the conversation in the cache", () => onPage(async (page) => {
  await live(page);
  await page.locator("#system-box summary").click();
  await page.fill("#system", "You are terse. Explain with one example each time.");
  await page.fill("#message", "What does a memory allocator do? Explain it in five sentences.");
  await page.keyboard.press("Enter");
  const lengths = new Set();
  const said = page.locator(".turn.model .said").first();
  await page.waitForFunction(() => document.querySelector(".turn.model .said")?.textContent.length > 0);
  while (await page.locator("#stop").isVisible()) lengths.add((await said.textContent()).length);
  assert.ok(lengths.size >= 3, `the answer grew in ${lengths.size} steps`);
  await page.fill("#message", "And the stack?");
  await page.locator("#send").click();
  const facts = page.locator(".turn.model .facts").nth(1);
  await page.waitForFunction(() => /prompt tokens cached/.test(document.querySelectorAll(".turn.model .facts")[1]?.textContent ?? ""), null, { timeout: 60_000 });
  const [, cached, prompt, ram] = /([\d,]+) of ([\d,]+) prompt tokens cached \(RAM ([\d,]*\d)/.exec(await facts.innerText());
  assert.ok(Number(cached.replace(",", "")) > 0, `${cached} of ${prompt}`);
  assert.equal(ram, cached);
  const newest = (await server.get("cache/requests")).requests.at(-1);
  assert.equal(newest.tiers[0].tokens.toLocaleString("en"), ram);
  assert.match(await facts.innerText(), /First token after [\d.,]+ m?s/);
  assert.match(await page.locator("#chat-status").textContent(), /^Answered/);
  await page.locator("#chat-clear").click();
  assert.equal(await page.locator(".turn").count(), 0);
}));

test("stop ends an answer, for the server too", () => onPage(async (page) => {
  await live(page);
  await page.fill("#message", "Count from one to five hundred, in words.");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector(".turn.model .said")?.textContent.length > 0);
  await page.locator("#stop").click();
  await page.waitForSelector("#send:visible");
  assert.equal(await page.locator(".turn.model .facts").innerText(), "stopped");
  await page.waitForFunction(() => document.querySelector("#requests tr .end")?.textContent === "cancelled");
  assert.equal((await server.get("cache/requests")).requests.at(-1).outcome, "cancelled");
}));

test("the tree is operated with keys alone: move, open, close, pin, unpin, remove after a question", () => onPage(async (page) => {
  await server.chat(about("What is stored on the heap?"));
  await live(page);
  await page.check("#tree-all");
  await page.waitForSelector('[role="treeitem"][aria-level="2"]');
  const tabStops = page.locator('[role="treeitem"][tabindex="0"]');
  assert.equal(await tabStops.count(), 1);
  await page.focus("#tree-all");
  await page.keyboard.press("Tab");
  await page.keyboard.press("Home");
  const root = await chosen(page).getAttribute("data-id");
  assert.equal(await chosen(page).getAttribute("aria-expanded"), "true");
  await page.keyboard.press("ArrowLeft");
  assert.equal(await chosen(page).getAttribute("aria-expanded"), "false");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  const leaf = await chosen(page).getAttribute("data-id");
  assert.notEqual(leaf, root);
  assert.equal(await chosen(page).getAttribute("aria-level"), "2");
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("ArrowUp");
  assert.equal(await chosen(page).getAttribute("data-id"), leaf);
  await page.keyboard.press("ArrowLeft");
  assert.equal(await chosen(page).getAttribute("data-id"), root);
  await page.keyboard.press("End");
  await page.keyboard.press("Home");
  assert.equal(await chosen(page).getAttribute("data-id"), root);

  const pinned = async () => (await prefixesOf(server)).find((prefix) => prefix.id === root)?.pinned;
  await page.keyboard.press("p");
  await page.waitForFunction(() => /Pinned/.test(document.getElementById("detail-said").textContent));
  assert.equal(await pinned(), true);
  assert.match(await chosen(page).innerText(), /pinned/);
  await page.keyboard.press("p");
  await page.waitForFunction(() => /Unpinned/.test(document.getElementById("detail-said").textContent));
  assert.equal(await pinned(), false);

  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("Delete");
  await page.waitForSelector("#ask[open]");
  await page.keyboard.press("Escape");
  await page.waitForSelector("#ask:not([open])", { state: "attached" });
  assert.ok((await prefixesOf(server)).some((prefix) => prefix.id === leaf), "asked, and kept");
  await page.keyboard.press("Delete");
  await page.waitForSelector("#ask[open]");
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => /Removed/.test(document.getElementById("detail-said").textContent));
  assert.ok(!(await prefixesOf(server)).some((prefix) => prefix.id === leaf));
  await page.waitForFunction((id) => !document.querySelector(`[data-id="${id}"]`), leaf);
}));

// Each branch was listed as shared, also those of one request; what was in RAM was said not to be on the disk; and
// branches beside each other began with the words that they have in common, and were cut to the same text.
test("the tree lists what prompts share, says every tier that has it, and tells branches beside each other apart", () => onPage(async (page) => {
  for (const question of ["What is a slice in Rust?", "What is a string in Rust?", "What is a string in Rust?"]) await server.chat(about(question));
  await live(page);
  await page.waitForSelector('[role="treeitem"]');
  const requests = () => page.locator('[role="treeitem"]').evaluateAll((rows) => rows.map((row) => Number(/([\d,]+) requests/.exec(row.textContent)[1])));
  assert.ok((await requests()).every((n) => n > 1), "a branch of one request is not shared");
  await page.check("#tree-all");
  await page.waitForFunction(() => [...document.querySelectorAll('[role="treeitem"]')].some((row) => / 1 requests/.test(` ${row.querySelectorAll(".number")[1].textContent}`)));
  const beside = await page.locator('[role="treeitem"][aria-level="2"] .snippet').evaluateAll((all) => all.map((one) => one.textContent.slice(0, 24)));
  assert.ok(beside.length >= 2 && new Set(beside).size === beside.length, `these look alike: ${beside.join(" | ")}`);

  const onDisk = (prefix) => prefix.tiers.find((tier) => tier.name === "disk").tokens;
  let shared;
  do shared = (await prefixesOf(server)).find((prefix) => prefix.requests >= 3 && prefix.parent === null);
  while (onDisk(shared) < shared.tokens);
  assert.deepEqual(shared.tiers, [{ name: "ram", tokens: shared.tokens }, { name: "disk", tokens: shared.tokens }]);
  assert.equal(shared.cached_tokens, shared.tokens);
  await page.waitForFunction(() => /^all in RAM, all on disk$/.test(document.querySelector('[role="treeitem"] .bar').getAttribute("aria-label")));
}));

test("a telephone is told of no keys that it does not have", async () => {
  const told = async (page) => {
    await live(page);
    const placeholder = await page.getAttribute("#message", "placeholder");
    return [await page.locator(".with-keys").isVisible(), await page.locator(".by-touch").isVisible(), placeholder.includes("Shift")];
  };
  await onPage(async (page) => assert.deepEqual(await told(page), [false, true, false]), PHONE);
  await onPage(async (page) => assert.deepEqual(await told(page), [true, false, true]));
});

test("buttons pin and remove a branch with all behind it", () => onPage(async (page) => {
  await live(page);
  await page.locator('[role="treeitem"]').first().click();
  const root = await chosen(page).getAttribute("data-id");
  await page.locator("#pin").click();
  await page.waitForFunction(() => document.getElementById("pin").textContent === "Unpin");
  assert.ok((await server.get("cache/stats")).ram.held_bytes > 0);
  await page.locator("#pin").click();
  await page.waitForFunction(() => document.getElementById("pin").textContent === "Pin");
  const before = (await server.get("cache/stats")).ram.entries;
  await page.locator("#remove").click();
  await page.locator("#ask-yes").click();
  await page.waitForFunction((id) => !document.querySelector(`[data-id="${id}"]`), root);
  const prefixes = await prefixesOf(server);
  assert.ok(!prefixes.some((prefix) => prefix.id === root || prefix.parent === root));
  assert.ok((await server.get("cache/stats")).ram.entries < before);
}));

test("what looks like markup in a prompt stays text", () => onPage(async (page) => {
  const markup = `<img src=x onerror="window.broken=1"><script>window.broken=1</script> ${"and so on ".repeat(20)}`;
  await server.post("v1/completions", { prompt: markup, max_tokens: 2 });
  await live(page);
  await page.fill("#message", markup);
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => /cached/.test(document.querySelector(".turn.model .facts")?.textContent ?? ""), null, { timeout: 60_000 });
  await page.check("#tree-all");
  await page.waitForFunction(() => [...document.querySelectorAll(".snippet")].some((one) => one.textContent.includes("<img src=x")));
  assert.equal(await page.locator("img, main script").count(), 0);
  assert.equal(await page.evaluate(() => window.broken), undefined);
}));

test("a telephone's width needs no scrolling sideways", async () => {
  for (const width of [390, 320]) {
    await onPage(async (page) => {
      await live(page);
      await page.waitForSelector("#requests tr");
      const { wanted, given } = await page.evaluate(() => ({ wanted: document.documentElement.scrollWidth, given: window.innerWidth }));
      assert.ok(wanted <= given, `${wanted} of ${given}`);
      assert.equal(await page.evaluate(() => getComputedStyle(document.querySelector("main")).gridTemplateColumns.split(" ").length), 1);
    }, { ...PHONE, viewport: { width, height: 844 } });
  }
});

test("light and dark follow the system until one is chosen, and the choice stays", () => onPage(async (page) => {
  const back = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  await page.emulateMedia({ colorScheme: "light" });
  const light = await back();
  await page.emulateMedia({ colorScheme: "dark" });
  const dark = await back();
  assert.notEqual(light, dark);
  await page.locator("#theme").click();
  assert.equal(await back(), light);
  await page.reload();
  assert.equal(await back(), light);
  await page.locator("#theme").click();
  await page.emulateMedia({ colorScheme: "light" });
  assert.equal(await back(), dark);
}));

test("accessibility: no serious violation, light, dark, and on a telephone", async () => {
  await server.chat(about("How many owners can a value have?"));
  await server.chat(about("What is garbage collection?"));
  for (const options of [{ colorScheme: "light" }, { colorScheme: "dark" }, { ...PHONE, colorScheme: "light" }]) {
    await onPage(async (page) => {
      await live(page);
      await page.waitForSelector('[role="treeitem"]');
      await page.locator('[role="treeitem"]').first().click();
      await page.fill("#message", "Hello");
      await page.keyboard.press("Enter");
      await page.waitForFunction(() => /cached/.test(document.querySelector(".turn.model .facts")?.textContent ?? ""), null, { timeout: 60_000 });
      const asked = async () => {
        await page.evaluate(AXE);
        const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
        return violations.filter((one) => ["serious", "critical"].includes(one.impact)).map((one) => `${one.id}: ${one.nodes.map((node) => node.html.slice(0, 120)).join(" | ")}`);
      };
      assert.deepEqual(await asked(), []);
      await page.locator("#remove").click();
      assert.deepEqual(await asked(), [], "with the question open");
    }, options);
  }
});

test("a server that goes is missed, and found again with what its disk kept", () => onPage(async (page) => {
  const question = about("What is pushed when a function is called?");
  await server.chat(question);
  await live(page);
  await server.stop();
  await page.waitForSelector("#gone:visible");
  assert.match(await page.locator("#gone").innerText(), /does not answer/);
  await server.start();
  await page.waitForSelector('#state[data-state="live"]', { timeout: 30_000 });
  assert.ok(await page.locator("#gone").isHidden());
  await page.waitForFunction(() => document.querySelectorAll("#requests tr").length === 0);
  await server.chat(question);
  await page.waitForFunction(() => document.querySelectorAll("#requests tr").length === 1);
  const { tokens } = (await server.get("cache/requests")).requests.at(-1).tiers.find((tier) => tier.name === "disk");
  assert.ok(tokens > 0, "its prompt came from the disk");
  assert.match(await page.locator("#requests .bar").first().getAttribute("aria-label"), new RegExp(`${tokens.toLocaleString("en")} tokens from disk`));
}, { allowed: /ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE|ERR_SOCKET_NOT_CONNECTED/ }));

test("with keys: none, a wrong one, a tenant's and the operator's", async () => {
  const keys = { operator: "operator-0123456789abcdef", tenant: "tenant-0123456789abcdef" };
  const withKeys = await Server.inNewFolder(BINARY);
  try {
    const file = await withKeys.file("keys", `${keys.operator}\n${keys.tenant} acme\n`);
    await withKeys.start(["--ram-gib", "0.25", "--api-key-file", file]);
    await onPage(async (page) => {
      const give = async (key) => {
        await page.fill("#key", key);
        await page.locator('#key-form button[type="submit"]').click();
      };
      const asks = (text) => page.waitForFunction((part) => !document.getElementById("key-form").hidden && document.getElementById("key-label").textContent.includes(part), text);
      await asks("asks for an API key");
      assert.equal(await page.evaluate(() => document.activeElement.id), "key");
      await give("not-a-key-of-this-server");
      await asks("does not know this key");
      await give(keys.tenant);
      await asks("may chat, but not see the cache");
      await page.fill("#message", "Hello");
      await page.keyboard.press("Enter");
      await page.waitForFunction(() => /cached/.test(document.querySelector(".turn.model .facts")?.textContent ?? ""), null, { timeout: 60_000 });
      await give(keys.operator);
      await live(page);
      await page.waitForFunction(() => /acme/.test(document.getElementById("requests").textContent));
      assert.deepEqual(await page.context().cookies(), []);
      assert.ok(!(await page.evaluate(() => JSON.stringify(localStorage))).includes("operator-"));
      await page.locator("#change-key").click();
      await page.locator("#forget-key").click();
      await asks("asks for an API key");
    }, { of: withKeys, allowed: /status of 40[13]/ });
  } finally {
    await withKeys.end();
  }
});
