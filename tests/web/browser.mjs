// Drives Chromium for the tests: one JSON command a line on stdin, one JSON answer a line on stdout.
import { createInterface } from "node:readline";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(process.argv[2] + "/");
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const browser = await chromium.launch({ executablePath: process.argv[3], args: flags });
let page;
const errors = [];

const commands = {
  async open({ url, width = 1280, height = 900, colorScheme = "light" }) {
    await page?.context().close();
    const context = await browser.newContext({ viewport: { width, height }, colorScheme });
    page = await context.newPage();
    page.on("pageerror", (error) => errors.push(error.message));
    page.on("dialog", (dialog) => dialog.accept());
    await page.goto(url);
  },
  async text({ selector }) {
    const found = page.locator(selector);
    // Rows out of sight are not rendered (content-visibility) and have no text yet; one that goes meanwhile has none.
    if (await found.count()) await found.first().scrollIntoViewIfNeeded({ timeout: 2000 }).catch(() => {});
    return found.allInnerTexts();
  },
  async click({ selector }) { await page.locator(selector).first().click(); },
  async press({ key }) { await page.keyboard.press(key); },
  async type({ text }) { await page.keyboard.type(text); },
  async fill({ selector, text }) { await page.locator(selector).first().fill(text); },
  async visible({ selector }) { return page.locator(selector).first().isVisible(); },
  async evaluate({ expression }) { return page.evaluate(expression); },
  async screenshot({ path }) { await page.screenshot({ path }); },
  async errors() { return errors.splice(0); },
  async axe() {
    await page.evaluate(axe);
    const found = await page.evaluate(() => axe.run());
    return found.violations.map((each) => `${each.id}: ${each.help}: ${each.nodes.map((node) => node.target).join(" ")}`);
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { op, ...options } = JSON.parse(line);
  let answer;
  try { answer = { value: (await commands[op](options)) ?? null }; } catch (error) { answer = { error: String(error) }; }
  console.log(JSON.stringify(answer));
}
await browser.close();
