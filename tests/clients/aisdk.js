// The AI SDK against a server: node aisdk.js URL KEY MODEL QUESTION LONG. Prints what came of a chat, a stream and a prompt that does not fit.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, streamText } from "ai";

const [url, apiKey, name, question, long] = process.argv.slice(2);
const model = createOpenAICompatible({ name: "kvkeep", baseURL: `${url}/v1`, apiKey })(name);
const settings = { model, temperature: 0, maxOutputTokens: 12, maxRetries: 0 };

const chat = (await generateText({ ...settings, prompt: question })).text;
const parts = [];
for await (const part of streamText({ ...settings, prompt: question }).textStream) parts.push(part);
let overflow = null;
try {
  await generateText({ ...settings, prompt: long });
} catch (error) {
  overflow = { known: APICallError.isInstance(error), status: error.statusCode, message: error.message };
}
console.log(JSON.stringify({ chat, parts, overflow }));
