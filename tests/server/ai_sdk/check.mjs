// Vercel's AI SDK against a running server, by three of its providers: node check.mjs http://127.0.0.1:11434
//
// Prints a line per case and ends with 1 if one fails. Before the first run: npm ci

import fs from 'node:fs';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from 'ai';
import { z } from 'zod';

const address = { baseURL: `${process.argv[2]}/v1`, apiKey: 'none' };
const image = fs.readFileSync(new URL('../../../examples/sign.png', import.meta.url));
const options = { temperature: 0, maxOutputTokens: 100, maxRetries: 0 };
const ANSWER = 'I am a tiny demo model.';
let failed = 0;

async function check(name, ask) {
  try {
    console.log('ok  ', name, JSON.stringify(await ask()));
  } catch (error) {
    failed += 1;
    console.log('FAIL', name, error.name, String(error.message).slice(0, 300), error.responseBody ?? '');
  }
}

function same(found, wanted) {
  if (JSON.stringify(found) !== JSON.stringify(wanted)) throw new Error(`${JSON.stringify(found)} is not ${JSON.stringify(wanted)}`);
  return found;
}

async function all(parts) {
  const found = [];
  for await (const part of parts) found.push(part);
  return found;
}

const weather = tool({
  description: 'Weather at a place',
  inputSchema: z.object({ days: z.number().int().min(1).max(9) }),
  execute: async () => 'sunny',
});
const compatible = createOpenAICompatible({ name: 'edge', includeUsage: true, supportsStructuredOutputs: true, ...address });
const openai = createOpenAI(address);

for (const [name, model] of [
  ['compatible', compatible('demo')],
  ['chat', openai.chat('demo')],
  ['responses', openai.responses('demo')],
]) {
  const asked = { model, prompt: 'Who are you?', ...options };
  const streamed = { ...asked, onError() {} };
  const calling = { ...streamed, tools: { weather }, toolChoice: 'required' };
  await check(`${name}: text`, async () => same((await generateText(asked)).text, ANSWER));
  await check(`${name}: stream`, async () => {
    const result = streamText(streamed);
    const text = same((await all(result.textStream)).join(''), ANSWER);
    if (!((await result.usage).totalTokens > 0)) throw new Error('no usage');
    return text;
  });
  await check(`${name}: picture`, async () => {
    const content = [{ type: 'text', text: 'What does it say?' }, { type: 'image', image, mediaType: 'image/png' }];
    return same((await generateText({ ...options, model, messages: [{ role: 'user', content }] })).text, 'CAFE');
  });
  await check(`${name}: object`, async () => {
    const schema = z.object({ a: z.number().int().min(0).max(9), b: z.enum(['x', 'y']) });
    return (await generateObject({ ...asked, schema })).object;
  });
  await check(`${name}: streamed object`, async () => {
    const result = streamObject({ ...streamed, schema: z.object({ a: z.boolean() }) });
    await all(result.partialObjectStream);
    return result.object;
  });
  await check(`${name}: two turns`, async () => {
    const first = await generateText(asked);
    const question = { role: 'user', content: asked.prompt };
    const messages = [question, ...first.response.messages, question];
    return (await generateText({ ...options, model, messages })).text;
  });
  await check(`${name}: a tool`, async () => {
    const { toolCalls } = await generateText({ ...calling, stopWhen: stepCountIs(1) });
    return same(toolCalls.map((call) => call.toolName), ['weather']);
  });
  await check(`${name}: a streamed tool`, async () => {
    const result = streamText({ ...calling, toolChoice: { type: 'tool', toolName: 'weather' } });
    await all(result.fullStream);
    return same((await result.toolCalls).map((call) => call.toolName), ['weather']);
  });
  await check(`${name}: the result of a tool goes back`, async () => {
    const { steps } = await generateText({ ...calling, stopWhen: stepCountIs(2) });
    return same(steps.length, 2);
  });
}
await check('completion', async () => (await generateText({ model: compatible.completionModel('demo'), prompt: 'I am', ...options })).text);
await check('a hosted tool beside a function', async () => {
  const tools = { web: openai.tools.webSearch({}), weather };
  return (await generateText({ model: openai.responses('demo'), tools, prompt: 'Who are you?', ...options })).text;
});
process.exit(failed ? 1 : 0);
