// The pictures in docs/: a real server under a load like that of a working day: two tenants, each with
// its system prompt and documents, questions about them, a restart, and more questions. And how it looks at first, right after a
// restart, and while eight requests are under way.
//
//   tests/dashboard/run.sh pictures

import { readFile } from "node:fs/promises";

import { launch, live, open } from "./browser.js";
import { Server } from "./server.js";

const TEXTS = new URL("../../crates/kvkeep-cli/texts/", import.meta.url);
const DOCS = new URL("../../docs/", import.meta.url);
const KEYS = { operator: "picture-operator-key", northwind: "picture-northwind-key", lumen: "picture-lumen-key" };

const text = async (name, characters) => (await readFile(new URL(name, TEXTS), "utf8")).slice(0, characters);
const TENANTS = {
  northwind: {
    system: "You are the assistant of Northwind's legal department. Answer from the document that you are given, in one sentence, and quote the words that you rely on.",
    documents: [[await text("constitution.txt", 4200), ["Who holds all legislative powers?", "How old must a Representative be?", "How long is the term of a Senator?", "Which house can impeach?", "Who chooses the Speaker of the House?"]],
      [await text("declaration.txt", 3600), ["Which truths are self-evident?", "Who is accused in this text?", "When may a people abolish its government?"]]],
  },
  lumen: {
    system: "You teach Rust at Lumen. Answer questions about the chapter below for beginners: short sentences, one example.",
    documents: [[await text("ownership.txt", 4800), ["What is ownership in Rust?", "What is stored on the stack?", "How many owners can a value have?", "What is garbage collection?", "Why is the heap slower to access?"]]],
  },
};

const messages = (system, document, question) => [{ role: "system", content: system }, { role: "user", content: `${document}\n\n${question}` }];

/** Every question, document by document; `from` and `to` bound the questions of each document. */
async function ask(server, from, to) {
  for (const [tenant, { system, documents }] of Object.entries(TENANTS)) {
    for (const [document, questions] of documents) {
      for (const question of questions.slice(from, to)) {
        await server.chat(messages(system, document, question), { key: KEYS[tenant], max_tokens: 20 });
      }
    }
  }
}

const LIGHT = { viewport: { width: 1360, height: 900 }, colorScheme: "light" };
const LOOKS = {
  light: LIGHT,
  dark: { viewport: { width: 1360, height: 900 }, colorScheme: "dark" },
  phone: { viewport: { width: 390, height: 844 }, colorScheme: "light", deviceScaleFactor: 2, hasTouch: true, isMobile: true },
};
const browser = await launch();
const server = await Server.inNewFolder(process.env.KVKEEP);

/** The page as the operator has it, after `steps`. */
async function picture(name, options, steps = async () => {}) {
  const { page, close } = await open(browser, server.url, options);
  await page.fill("#key", KEYS.operator);
  await page.locator('#key-form button[type="submit"]').click();
  await live(page);
  await steps(page);
  await page.waitForTimeout(1500);
  await page.evaluate(() => window.scrollTo(0, 0));
  await page.screenshot({ path: new URL(`dashboard-${name}.png`, DOCS).pathname, fullPage: name !== "phone" });
  await close();
}

/** Two questions in the chat, and a look at a prefix. */
async function use(page) {
  for (const [turn, question] of ["What is gravity?", "Why is the sky blue?"].entries()) {
    await page.fill("#message", question);
    await page.keyboard.press("Enter");
    await page.waitForFunction((n) => /cached/.test(document.querySelectorAll(".turn.model .facts")[n]?.textContent ?? ""), turn, { timeout: 120_000 });
  }
  await page.locator('[role="treeitem"]').nth(1).click();
  await page.keyboard.press("ArrowRight");
}

try {
  const file = await server.file("keys", `${KEYS.operator}\n${KEYS.northwind} northwind\n${KEYS.lumen} lumen\n`);
  await server.start(["--ram-gib", "0.5", "--api-key-file", file]);
  await picture("first", LIGHT);
  await ask(server, 0, 2);
  await server.stop();
  await server.start();
  await ask(server, 0, 1);
  await picture("restart", LIGHT);
  const drafts = [["agent.txt", 0], ["constitution.txt", 900], ["declaration.txt", 1500], ["ownership.txt", 700], ["tools.jsonl", 0]];
  for (const [part, [name, from]] of drafts.entries()) {
    await ask(server, part, part + 1);
    const draft = (await text(name, 6000)).slice(from);
    for (const question of ["Which words are misspelt?", "Which sentence is the longest?"]) {
      await server.chat(messages("You proofread for the operator of this server.", draft, question), { key: KEYS.operator, max_tokens: 20 });
    }
  }
  await ask(server, 0, 5);

  for (const [name, options] of Object.entries(LOOKS)) {
    await picture(name, options, use);
  }
  const { system, documents: [[document, questions]] } = TENANTS.northwind;
  const many = (key) => Array.from({ length: 8 }, (_, at) => server.chat(messages(system, document, `${questions[at % questions.length]} (${at})`), { key, max_tokens: 200 }));
  let under = [];
  await picture("load", LIGHT, async () => {
    under = many(KEYS.northwind);
  });
  await Promise.all(under);
} finally {
  await browser.close();
  await server.end();
}
