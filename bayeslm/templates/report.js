"use strict";
// The table of texts: sorted by its headers, filtered by words, engine and prompt, and shown a page at a time.
(() => {
  const PAGE = 50;
  const LONG = 420; // characters, above which a text is folded
  const BINS = [0.1, 0.5, 1.5, 3]; // nats, from which a token has the next stronger colour
  const data = JSON.parse(document.getElementById("data").textContent);
  const table = document.getElementById("texts-table");
  if (!table) return;

  const [ENGINE, PROMPT, SITE, COPIES, SHARE, REWARD, WEIGHT, RATIO, PIECES, MOVES, TEXT] = Array(11).keys();
  const severalSites = data.sites.length > 1;
  const has = (index) => data.rows.some((row) => row[index] !== null && (index !== RATIO || row[index] !== 0));
  const severalEngines = data.engines.length > 1;
  const severalPrompts = data.prompts.length > 1;
  const columns = [
    { title: "text", index: TEXT, compare: (a, b) => a.localeCompare(b), up: true },
    { title: "prompt", index: PROMPT, up: true },
    { title: data.measure, index: REWARD, digits: 3 },
    { title: "weight", index: SHARE, percent: true, ofOneEngine: true, help: "share of the posterior of its prompt" },
    { title: "log w", index: WEIGHT, digits: 2, ofOneEngine: true, help: data.weight_help },
    { title: "log q − log p", index: RATIO, digits: 2, help: "how much likelier the text is under the policy, in nats" },
    { title: "draws", index: COPIES, digits: 0 },
    { title: "engine", index: ENGINE, names: data.engines, up: true },
    { title: "site", index: SITE, names: data.sites, up: true },
  ].filter(({ index }) => (index !== SITE || severalSites) && (index !== PROMPT || severalPrompts) && (index === TEXT || has(index)));

  const number = (value) => (value === "-inf" ? -Infinity : value === "inf" ? Infinity : value);
  for (const row of data.rows) {
    row[TEXT] = row[PIECES].join("");
    for (const index of [REWARD, WEIGHT, RATIO]) row[index] = number(row[index]);
  }
  const first = columns.find(({ index }) => index === REWARD); // by which the table is sorted at first
  const state = { by: first, up: false, shown: PAGE, rows: [], columns };

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  const format = (column, value) => {
    if (column.names) return column.names[value];
    if (column.index === PROMPT) return value < 0 ? "all" : data.prompts[value];
    if (value === null) return "–";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
    const text = column.percent ? (100 * value).toFixed(value < 0.0995 ? 2 : 1) + "%" : value.toFixed(column.digits);
    return text.replace(/^-(?=0*\.?0*%?$)/, "").replace("-", "−");
  };

  const strength = (move) => Math.sign(move) * BINS.filter((bin) => Math.abs(move) >= bin).length;

  const tokens = (row) => {
    const pieces = row[PIECES].map((piece, i) => (i ? piece : piece.replace(/^ /, ""))); // the space after the prompt
    if (!row[MOVES].length) return pieces;
    return pieces.map((piece, i) => {
      const move = row[MOVES][i];
      const bin = strength(move);
      const sign = move < 0 ? "−" : "+";
      const title = `${sign}${Math.abs(move).toFixed(2)}`;
      return element("span", { class: bin ? `token m${bin}` : "token", title }, piece);
    });
  };

  const cell = (row, column) => {
    if (column.index !== TEXT) {
      const value = row[column.index];
      const words = column.names || column.index === PROMPT;
      const attributes = { class: column.index === PROMPT ? "words of-prompt" : words ? "words" : "", "data-label": column.title };
      const swatch = column.index === ENGINE ? [element("span", { class: `swatch series-${value % 6}` })] : [];
      return element("td", attributes, ...swatch, words ? element("bdi", {}, format(column, value)) : format(column, value));
    }
    const text = element("bdi", { class: "text" }, ...tokens(row));
    const made = element("td", { class: "words" }, text);
    if (row[TEXT].length > LONG) {
      const button = element("button", { type: "button", class: "fold", "aria-expanded": "false" }, "all of it");
      text.classList.add("folded");
      button.addEventListener("click", () => {
        const open = text.classList.toggle("folded");
        button.setAttribute("aria-expanded", String(!open));
        button.textContent = open ? "all of it" : "less of it";
      });
      made.append(button);
    }
    return made;
  };

  const find = document.getElementById("find");
  const engine = document.getElementById("engine");
  const prompt = document.getElementById("prompt");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const body = table.tBodies[0];

  const draw = () => {
    const shown = state.rows.slice(0, state.shown);
    body.replaceChildren(...shown.map((row) => element("tr", {}, ...state.columns.map((column) => cell(row, column)))));
    const left = state.rows.length - shown.length;
    more.hidden = !left;
    more.textContent = `${Math.min(left, PAGE)} more`;
    const all = state.rows.length === data.rows.length;
    const total = data.rows.length.toLocaleString("en");
    count.textContent = all ? `${total} texts` : `${state.rows.length.toLocaleString("en")} of ${total} texts`;
  };

  const compare = (a, b) => {
    const [x, y] = [a[state.by.index], b[state.by.index]];
    if (x === y) return 0;
    if (x === null || y === null) return x === null ? 1 : -1; // what is not known comes last, whatever the order
    const order = state.by.compare ? state.by.compare(x, y) : x < y ? -1 : 1;
    return state.up ? order : -order;
  };

  const update = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    state.shown = PAGE;
    state.columns = columns.filter((column) => !column.ofOneEngine || !severalEngines || engine.value !== "");
    if (!state.columns.includes(state.by)) state.by = first;
    const headers = state.columns.map((column) => column.header);
    if (headers.length !== table.tHead.rows[0].cells.length) table.tHead.rows[0].replaceChildren(...headers); // keeps the focus
    state.rows = data.rows.filter(
      (row) =>
        (engine.value === "" || row[ENGINE] === Number(engine.value)) &&
        (prompt.value === "" || row[PROMPT] === Number(prompt.value) || row[PROMPT] < 0) &&
        words.every((word) => row[TEXT].toLowerCase().includes(word)),
    );
    state.rows.sort(compare);
    for (const column of columns) {
      column.header.setAttribute("aria-sort", column !== state.by ? "none" : state.up ? "ascending" : "descending");
    }
    draw();
  };

  for (const column of columns) {
    const attributes = { type: "button" };
    if (column.help) attributes.title = column.help;
    const button = element("button", attributes, column.title);
    button.addEventListener("click", () => {
      state.up = state.by === column ? !state.up : Boolean(column.up);
      state.by = column;
      update();
    });
    const words = column.index === TEXT || column.index === PROMPT || column.names ? "words" : "";
    column.header = element("th", { scope: "col", class: words }, button);
  }
  const option = (name, i) => element("option", { value: String(i) }, name);
  engine.append(...data.engines.map(option));
  prompt.append(...data.prompts.map((name, i) => option(`${i + 1}  ${name}`, i)));
  engine.parentElement.hidden = !severalEngines;
  prompt.parentElement.hidden = !severalPrompts;
  find.addEventListener("input", update);
  engine.addEventListener("change", update);
  prompt.addEventListener("change", update);
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const next = body.rows.length;
    state.shown += PAGE;
    draw();
    body.rows[next].tabIndex = -1;
    body.rows[next].focus({ preventScroll: true });
  });
  document.getElementById("scale").hidden = !data.rows.some((row) => row[MOVES].length);
  document.getElementById("filters").hidden = false;
  table.hidden = false;
  update();
})();
