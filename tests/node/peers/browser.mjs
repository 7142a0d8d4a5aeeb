// A reader of the live page in a real browser. Prints what it saw as JSON; the scenario judges it.
// usage: node browser.mjs URL FOLDER-FOR-SCREENSHOTS SEARCH   SEARCH: words that some connections have and others not
import { createRequire } from "node:module";
import path from "node:path";

const [url, folder, words] = process.argv.slice(2);
const driver = path.join(import.meta.dirname, "../../../target/test-browser/package.json");
const { chromium } = createRequire(driver)("playwright-core");
const patience = 30000;
const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
const seen = { console: [], external: [], violations: [] };

async function open(options) {
  const context = await browser.newContext({ viewport: { width: 1440, height: 1000 }, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(patience);
  page.on("console", (message) => {
    if (message.type() === "error" || message.type() === "warning") seen.console.push(message.text());
  });
  page.on("pageerror", (error) => seen.console.push(`${error.message} ${error.stack}`));
  page.on("request", (request) => {
    const to = new URL(request.url());
    if (to.protocol !== "data:" && to.origin !== new URL(url).origin) seen.external.push(request.url());
  });
  if (options.javaScriptEnabled !== false) {
    await context.addInitScript(() => {
      window.violations = [];
      document.addEventListener("securitypolicyviolation", (event) =>
        window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`),
      );
    });
  }
  return page;
}

const rows = (page) => page.locator("#connections-rows tr[data-key]");
const active = (page, what) => page.evaluate(what);

// What everybody sees.
const page = await open({ colorScheme: "light" });
const begun = Date.now();
const response = await page.goto(url);
seen.headers = response.headers();
seen.loaded = await page.evaluate(() => Math.round(performance.getEntriesByType("navigation")[0].loadEventEnd));
await rows(page).first().waitFor();
await page.locator("#graph .chip").first().waitFor();
seen.live = Date.now() - begun;
seen.rowsInDocument = await rows(page).count();
seen.found = await page.textContent("#found");
seen.summary = await page.locator("#summary dd").allTextContents();
seen.attention = await page.locator("#attention li").allTextContents();
seen.pods = await page.locator("#pods-rows tr").allTextContents();
seen.refusals = await page.locator("#refusals-rows tr").allTextContents();
seen.certificates = await page.locator("#certificates-rows tr").allTextContents();
seen.nodes = await page.locator("#nodes-rows tr").allTextContents();
seen.chips = await page.locator("#graph .chip").count();
seen.lines = {};
for (const kind of ["encrypted", "plaintext", "refused"]) {
  const line = page.locator(`#graph .edge.${kind}`).first();
  if ((await line.count()) > 0) {
    seen.lines[kind] = await line.evaluate((path) => {
      const style = getComputedStyle(path);
      return `${style.strokeDasharray} ${style.markerEnd}`;
    });
  }
}
await page.screenshot({ path: path.join(folder, "light.png") });
await page.screenshot({ path: path.join(folder, "light-whole.png"), fullPage: true });

// News appear without a reload.
const time = await page.textContent("#feed-time");
await page.waitForFunction((before) => document.querySelector("#feed-time").textContent !== before, time);
seen.news = true;

// The keyboard alone: search, rows, details, back; sorting; a workload of the graph.
await page.keyboard.press("/");
seen.slash = await active(page, () => document.activeElement.id);
await page.keyboard.type(words);
await page.waitForFunction(() => !/^(\d+) of \1 /.test(document.querySelector("#found").textContent));
seen.filtered = await page.textContent("#found");
seen.filteredRows = await rows(page).allTextContents();
await page.keyboard.press("Enter");
const key = () => document.activeElement.dataset.key ?? null;
seen.firstRow = await active(page, key);
await page.keyboard.press("ArrowDown");
seen.secondRow = await active(page, key);
seen.focusSeen = await active(page, () => getComputedStyle(document.activeElement).outlineStyle);
await page.keyboard.press("Enter");
seen.detail = await page.textContent("#detail dl");
await page.screenshot({ path: path.join(folder, "details.png") });
await page.keyboard.press("Escape");
seen.back = await active(page, key);
await page.keyboard.press("/");
await page.keyboard.press("Delete");
await page.waitForFunction(() => /^(\d+) of \1 /.test(document.querySelector("#found").textContent));
await page.keyboard.press("Enter");
await page.keyboard.press("End");
seen.lastIndex = await active(page, () => Number(document.activeElement.getAttribute("aria-rowindex")));
seen.rowCount = await active(page, () => Number(document.querySelector("#connections-table").ariaRowCount));
await page.focus("#connections-table thead th:nth-child(4) button");
await page.keyboard.press("Enter");
seen.sorted = await page.getAttribute("#connections-table thead th:nth-child(4)", "aria-sort");
seen.mostSent = await rows(page).first().locator("td").nth(2).textContent();
await page.locator('#graph .chip[tabindex="0"]').focus();
seen.chip = await active(page, () => document.activeElement.dataset.name);
await page.keyboard.press("ArrowDown");
seen.nextChip = await active(page, () => document.activeElement.dataset.name);
await page.keyboard.press("Enter");
seen.center = await page.getAttribute("#graph .chip.center", "data-name");
await page.screenshot({ path: path.join(folder, "workload.png") });
await page.keyboard.press("Escape");
seen.chipsAfter = await page.locator("#graph .chip").count();

// Explain.
await page.fill("#from", (await page.locator("#podnames option").first().getAttribute("value")) ?? "");
await page.fill("#to", "10.96.0.1:80");
await page.press("#to", "Enter");
await page.locator("#answer > div").waitFor();
seen.explained = await page.textContent("#answer");

// Pause.
await page.click("#pause");
seen.paused = [await page.getAttribute("#pause", "aria-pressed"), await page.textContent("#feed-state")];
seen.hacked = await page.evaluate(() => typeof window.hacked);
seen.violations.push(...(await page.evaluate(() => window.violations)));
await page.close();

// In the dark.
const dark = await open({ colorScheme: "dark", reducedMotion: "reduce" });
await dark.goto(url);
await rows(dark).first().waitFor();
await dark.locator("#graph .chip").first().waitFor();
seen.dark = await dark.evaluate(() => getComputedStyle(document.body).backgroundColor);
seen.motion = await dark.evaluate(() => getComputedStyle(document.documentElement).scrollBehavior);
await dark.screenshot({ path: path.join(folder, "dark.png") });
seen.violations.push(...(await dark.evaluate(() => window.violations)));
await dark.close();

// Without scripts.
const plain = await open({ javaScriptEnabled: false });
await plain.goto(url);
seen.plain = {};
for (const section of ["nodes", "flows", "connections", "refusals", "pods", "certificates"])
  seen.plain[section] = await plain.locator(`#${section}-rows tr`).count();
seen.plain.pager = await plain.textContent("#pager");
seen.plain.text = await plain.textContent("main");
await plain.screenshot({ path: path.join(folder, "plain.png") });
await plain.fill("#q", words);
await plain.press("#q", "Enter");
seen.plain.found = await plain.textContent("#pager");
await browser.close();
console.log(JSON.stringify(seen));
