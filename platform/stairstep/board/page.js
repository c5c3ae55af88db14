"use strict";
// The page's own script: draws the figures, sorts tables, shows and filters questions, and compares any two evaluations.
// All text of a run is put in as text, never as markup; the only markup that is set is the main part, which the board escaped itself.
(() => {
  const STATES = { correct: "correct", incorrect: "incorrect", not_attempted: "not attempted", unanswered: "unanswered", ungraded: "ungraded" };
  const GRADED = ["correct", "incorrect", "not_attempted"];
  const PAGE = 25;
  const Z = 1.959963984540054;
  const ASK_EVERY_MS = 3000;
  const at = (id) => document.getElementById(id);
  const main = at("main");
  let data = null;
  let sorted = {};

  // --- small helpers

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") node.className = value;
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((one) => one !== null && one !== undefined));
    return node;
  }
  const short = (value) => (Number.isFinite(value) ? value.toFixed(3).replace(/^(-?)0\./, "$1.").replace(/^-(?=\.000$)/, "") : "–");
  const count = (value) => value.toLocaleString("en");
  function trouble(text) {
    at("trouble").textContent = text;
    at("trouble").hidden = false;
  }

  async function unpack(id) {
    const text = atob(at(id).textContent);
    const bytes = Uint8Array.from(text, (one) => one.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  // --- figures

  function themed(spec) {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    const layout = structuredClone(spec.layout);
    layout.font = { ...layout.font, color: colour("--ink") };
    layout.hoverlabel = { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink"), size: 13 }, align: "left" };
    for (const name of ["xaxis", "yaxis"]) {
      layout[name] = { ...layout[name], gridcolor: colour("--grid"), linecolor: colour("--line"), tickfont: { color: colour("--soft"), size: 12 } };
      if (layout[name].title) layout[name].title.font = { color: colour("--soft"), size: 12.5 };
    }
    return layout;
  }
  function draw() {
    for (const [id, spec] of Object.entries(data.figures)) {
      const place = at(`figure-${id}`);
      if (place) Plotly.react(place, spec.data, themed(spec), { displayModeBar: false, responsive: true });
    }
  }

  // --- tables

  function key(cell) {
    const given = cell.dataset.sort ?? cell.textContent;
    if (given === "-inf") return -Infinity;
    const number = Number(given);
    return given !== "" && !Number.isNaN(number) ? number : given;
  }
  function sortTable(table, column, descending) {
    const rows = [...table.tBodies[0].rows];
    const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
    rows.sort((a, b) => compare(key(a.cells[column]), key(b.cells[column])) * (descending ? -1 : 1));
    table.tBodies[0].append(...rows);
    [...table.tHead.rows[0].cells].forEach((head, place) => {
      head.setAttribute("aria-sort", place !== column ? "none" : descending ? "descending" : "ascending");
    });
    sorted[table.id] = [column, descending];
  }
  function tables() {
    for (const table of main.querySelectorAll("table")) {
      [...table.tHead.rows[0].cells].forEach((head, column) => {
        head.firstChild.onclick = () => sortTable(table, column, head.getAttribute("aria-sort") === "ascending");
      });
      if (sorted[table.id]) sortTable(table, ...sorted[table.id]);
    }
  }

  // --- questions

  // A letter is A + state + 6 × place: where the golden tile stood (2: first, 1: among the first three) and what became of the answer.
  function outcome(letter) {
    const code = letter.charCodeAt(0) - 65;
    const states = data.questions.states;
    return { place: Math.floor(code / states.length), state: states[code % states.length] };
  }
  function fill(select, options) {
    select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  }
  const named = (one) => `${one.label} · step ${one.step}`;
  const PLACES = ["golden tile not in the first three", "golden tile in the first three", "golden tile first"];
  const SHORT = ["not in top 3", "in top 3", "golden first"];
  function chip(text, kind) {
    return make("span", { class: `chip ${kind}` }, text);
  }
  function chips(one, before) {
    const found = make("span", { class: "chips" });
    const gained = before ? one.place - before.place : 0;
    const place = before && gained ? `${SHORT[before.place]} → ${SHORT[one.place]}` : SHORT[one.place];
    found.append(chip(place, before ? (gained > 0 ? "correct" : gained < 0 ? "incorrect" : "") : one.place === 2 ? "correct" : ""));
    if (!one.state) return found;
    const changed = before && before.state && before.state !== one.state;
    found.append(chip(changed ? `${STATES[before.state]} → ${STATES[one.state]}` : STATES[one.state], one.state));
    return found;
  }
  function tile(listed, golden) {
    const [article, path, score, place] = listed;
    const right = golden.includes(article);
    const picture = data.thumbnails[place];
    return make(
      "div",
      { class: right ? "tile golden" : "tile" },
      picture ? make("img", { src: picture, alt: `tile ${path}`, loading: "lazy" }) : null,
      make("p", {}, right ? make("b", {}, "golden · ") : "", `${path || article} · ${short(score)}`),
    );
  }
  function answered(name, evaluation, place, golden) {
    const seen = outcome(evaluation.letters[place]);
    const detail = evaluation.details && evaluation.details[place];
    const list = make("dl");
    const say = (what, text) => list.append(make("dt", {}, what), make("dd", {}, text));
    if (name) say("Evaluation", name);
    if (seen.state) say("State", STATES[seen.state]);
    if (detail) {
      if (detail[0] !== null && detail[0] !== undefined) say("Answer", detail[0] || "(empty)");
      if (detail[1]) say("Reason", detail[1]);
      say("Golden tile", detail[2] ? `article at rank ${detail[2]}` : "not in the set");
    } else say("Golden tile", PLACES[seen.place]);
    const tiles = detail ? make("div", { class: "tiles" }, ...detail[3].map((one) => tile(one, golden))) : null;
    return make("div", { class: "inside" }, list, tiles);
  }
  function question(set, place, evaluations, summaryChips) {
    const [id, text, answer, golden] = data.questions.sets[set][place];
    const node = make("details", { "data-id": String(id) }, make("summary", {}, make("span", { class: "words" }, String(text)), summaryChips));
    node.addEventListener("toggle", () => {
      if (!node.open || node.childElementCount > 1) return;
      const list = make("dl", {}, make("dt", {}, "Question"), make("dd", {}, `${id}`), make("dt", {}, "Golden answer"), make("dd", {}, `${answer}`));
      if (golden.length) list.append(make("dt", {}, "Golden article"), make("dd", {}, golden.join(", ")));
      node.append(make("div", { class: "inside" }, list));
      for (const one of evaluations) node.append(answered(evaluations.length > 1 ? named(one) : "", one, place, golden));
    });
    return node;
  }
  function pages(into, nodes) {
    const opened = new Set([...into.querySelectorAll("details[open]")].map((one) => one.dataset.id));
    into.replaceChildren();
    let shown = 0;
    const more = make("button", { class: "more", type: "button" });
    const add = () => {
      const next = nodes.slice(shown, shown + PAGE).map((one) => one());
      shown += next.length;
      more.remove();
      into.append(...next);
      for (const node of next) node.open = opened.has(node.dataset.id);
      if (shown < nodes.length) {
        more.textContent = `Show more (${count(nodes.length - shown)} left)`;
        into.append(more);
      }
    };
    more.onclick = add;
    add();
  }
  const has = (text, words) => words.every((word) => text.includes(word));
  const wordsOf = (id) => at(id).value.toLowerCase().split(/\s+/).filter(Boolean);

  function questionsView() {
    if (!at("questions-of")) return;
    const asked = data.questions.asked;
    fill(at("questions-of"), asked.map((one, place) => [place, named(one)]));
    at("questions-of").value = asked.length - 1;
    fill(at("questions-state"), [["", "any"], ...Object.entries(STATES), ["none", "no reader asked"]]);
    const show = () => {
      const one = asked[at("questions-of").value];
      const [state, place, words] = [at("questions-state").value, at("questions-place").value, wordsOf("questions-search")];
      const found = [];
      data.questions.sets[one.set].forEach(([id, text, answer], index) => {
        const seen = outcome(one.letters[index]);
        if (state && seen.state !== (state === "none" ? "" : state)) return;
        if (place !== "" && seen.place !== Number(place)) return;
        const said = one.details ? one.details[index][0] ?? "" : "";
        if (words.length && !has(`${id} ${text} ${answer} ${said}`.toLowerCase(), words)) return;
        found.push(() => question(one.set, index, [one], chips(seen)));
      });
      at("questions-count").textContent = `${count(found.length)} of ${count(one.letters.length)} questions`;
      pages(at("questions-list"), found);
    };
    at("questions-form").oninput = show;
    at("questions-form").onsubmit = (event) => event.preventDefault();
    at("questions-form").show = show;
  }

  // --- two evaluations compared

  // Exact McNemar: of the questions on which two runs disagree, how likely is a split as uneven as this by the toss of a coin?
  function mcnemar(onlyFirst, onlySecond) {
    const n = onlyFirst + onlySecond;
    const smaller = Math.min(onlyFirst, onlySecond);
    let logTerm = -n * Math.LN2;
    let tail = Math.exp(logTerm);
    for (let i = 1; i <= smaller; i++) {
      logTerm += Math.log(n - i + 1) - Math.log(i);
      tail += Math.exp(logTerm);
    }
    return Math.min(1, 2 * tail);
  }
  function wilson(right, n) {
    if (!n) return [NaN, 0, 1];
    const rate = right / n;
    const scale = 1 + (Z * Z) / n;
    const half = (Z / scale) * Math.sqrt((rate * (1 - rate)) / n + (Z * Z) / (4 * n * n));
    const centre = (rate + (Z * Z) / (2 * n)) / scale;
    return [rate, right === 0 ? 0 : centre - half, right === n ? 1 : centre + half];
  }
  // Of a difference of paired rates, after Agresti and Min: a half is added to each of the four counts.
  function paired(rose, fell, n) {
    const [up, down, all] = [rose + 0.5, fell + 0.5, n + 2];
    const middle = (up - down) / all;
    const half = (Z * Math.sqrt(up + down - (up - down) ** 2 / all)) / all;
    return [(rose - fell) / n, Math.max(-1, middle - half), Math.min(1, middle + half)];
  }
  const interval = ([value, low, high]) => `${short(value)} [${short(low)} ${short(high)}]`;
  function right(seen, by) {
    if (by === "first") return seen.place === 2;
    if (by === "three") return seen.place >= 1;
    return GRADED.includes(seen.state) ? seen.state === "correct" : null;
  }
  function notComparable(pair, by) {
    if (pair[0].set !== pair[1].set) return "these two are not over the same questions";
    if (by !== "qa") return "";
    for (const one of pair) {
      if (one.coverage === null) return `${named(one)} asked no reader`;
      if (one.coverage < one.floor) {
        return `coverage of ${named(one)} is ${(one.coverage * 100).toFixed(1)}%, below the floor of ${(one.floor * 100).toFixed(1)}%`;
      }
    }
    return "";
  }
  function flipsView() {
    if (!at("flips-first")) return;
    const asked = data.questions.asked;
    const options = asked.map((one, place) => [place, named(one)]);
    fill(at("flips-first"), options);
    fill(at("flips-second"), options);
    at("flips-first").value = 0;
    at("flips-second").value = asked.length - 1;
    const show = () => {
      const pair = [asked[at("flips-first").value], asked[at("flips-second").value]];
      const by = at("flips-by").value;
      const why = notComparable(pair, by);
      if (why) {
        at("flips-said").replaceChildren(make("p", { class: "verdict" }, `Not compared: ${why}.`));
        at("flips-list").replaceChildren();
        return;
      }
      const counts = { first: 0, second: 0, n: 0 };
      const flips = { rose: [], fell: [] };
      for (let place = 0; place < pair[0].letters.length; place++) {
        const seen = pair.map((one) => outcome(one.letters[place]));
        const [before, after] = seen.map((one) => right(one, by));
        if (before === null || after === null) continue;
        counts.n += 1;
        counts.first += before;
        counts.second += after;
        if (before !== after) flips[after ? "rose" : "fell"].push([place, seen]);
      }
      say(pair, counts, flips);
      const wanted = at("flips-show").value;
      const words = wordsOf("flips-search");
      const listed = [...(wanted === "fell" ? [] : flips.rose), ...(wanted === "rose" ? [] : flips.fell)].filter(([place]) => {
        const [id, text, answer] = data.questions.sets[pair[0].set][place];
        return has(`${id} ${text} ${answer}`.toLowerCase(), words);
      });
      pages(at("flips-list"), listed.map(([place, seen]) => () => question(pair[0].set, place, pair, chips(seen[1], seen[0]))));
    };
    at("flips-form").oninput = show;
    at("flips-form").onsubmit = (event) => event.preventDefault();
    at("flips-form").show = show;
  }
  function say(pair, counts, flips) {
    const [rose, fell] = [flips.rose.length, flips.fell.length];
    const p = mcnemar(fell, rose);
    const verdict = p >= 0.05 ? "no difference shown" : rose > fell ? "better" : "worse";
    const sides = [wilson(counts.first, counts.n), wilson(counts.second, counts.n)];
    at("flips-said").replaceChildren(
      make(
        "p",
        { class: "verdict" },
        `${interval(sides[0])} → ${interval(sides[1])}, difference `,
        make("b", {}, counts.n ? interval(paired(rose, fell, counts.n)) : "–"),
        ` over ${count(counts.n)} questions; `,
        make("b", { id: "flips-rose" }, count(rose)),
        " turned right, ",
        make("b", { id: "flips-fell" }, count(fell)),
        ` turned wrong; p ${p < 0.001 ? "< .001" : short(p)}: `,
        make("span", { class: verdict.replaceAll(" ", "-"), id: "flips-verdict" }, verdict),
      ),
      make("p", { class: "note" }, "Exact McNemar test of these two runs alone: 1 seed a side, and not corrected for how many pairs are looked at."),
    );
  }

  // --- putting it together, and keeping what the person has chosen when news come in

  function chosen() {
    return Object.fromEntries([...main.querySelectorAll("select[id], input[id]")].map((one) => [one.id, one.value]));
  }
  function start(keep = {}) {
    draw();
    tables();
    questionsView();
    flipsView();
    for (const [id, value] of Object.entries(keep)) {
      const one = at(id);
      if (one && (one.tagName === "INPUT" || [...one.options].some((option) => option.value === value))) one.value = value;
    }
    for (const form of main.querySelectorAll("form")) if (form.show) form.show();
    const links = new Map([...main.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
    const seen = new IntersectionObserver(
      (entries) => {
        for (const one of entries) {
          if (!one.isIntersecting) continue;
          for (const link of links.values()) link.classList.remove("here");
          links.get(one.target.id).classList.add("here");
        }
      },
      { rootMargin: "-15% 0px -75% 0px" },
    );
    for (const id of links.keys()) seen.observe(at(id));
  }
  function renew(news) {
    const keep = chosen();
    const opened = Object.fromEntries(
      ["flips-list", "questions-list"].map((id) => [id, [...(at(id)?.querySelectorAll("details[open]") ?? [])].map((one) => one.dataset.id)]),
    );
    const focused = document.activeElement && document.activeElement.id;
    const top = window.scrollY;
    main.style.minHeight = `${main.offsetHeight}px`;
    for (const place of main.querySelectorAll(".js-plotly-plot")) Plotly.purge(place);
    main.innerHTML = news.main;
    data = news.data;
    start(keep);
    for (const [id, names] of Object.entries(opened)) {
      for (const one of at(id)?.querySelectorAll("details") ?? []) if (names.includes(one.dataset.id)) one.open = true;
    }
    main.style.minHeight = "";
    if (focused && at(focused)) at(focused).focus({ preventScroll: true });
    window.scrollTo({ top, behavior: "instant" });
  }
  async function watch(version) {
    for (;;) {
      await new Promise((done) => setTimeout(done, ASK_EVERY_MS));
      try {
        const answer = await fetch("board.json", { headers: { "If-None-Match": version }, cache: "no-store" });
        at("trouble").hidden = true;
        if (answer.status === 304) continue;
        if (!answer.ok) throw new Error(`it answered ${answer.status}: ${(await answer.text()).slice(0, 300)}`);
        version = answer.headers.get("ETag");
        renew(await answer.json());
      } catch (error) {
        trouble(`This page is not being updated: ${error.message}. It shows the last that it had.`);
      }
    }
  }
  async function begin() {
    if (typeof DecompressionStream === "undefined") {
      trouble("This browser cannot unpack the page's figures and questions (it has no DecompressionStream): use a browser of 2023 or later. The tables below are whole.");
      return;
    }
    try {
      const library = make("script");
      library.textContent = await unpack("library");
      document.head.append(library);
      data = JSON.parse(await unpack("data"));
      start();
    } catch (error) {
      trouble(`Figures and questions cannot be shown: ${error.message}. The tables below are whole.`);
      throw error;
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    document.documentElement.dataset.ready = "yes";
    if (main.dataset.watched) watch(main.dataset.watched);
  }
  begin();
})();
