"use strict";
(() => {
  const blocks = [...document.querySelectorAll("script.explorer-data")];
  const parsed = new Map();
  const $ = (id) => document.getElementById(id);
  const app = $("explorer-app");
  const state = { task: 0, example: 0, decode: 0, step: 0 };

  const view = () => {
    if (!parsed.has(state.task)) parsed.set(state.task, JSON.parse(blocks[state.task].textContent));
    return parsed.get(state.task);
  };
  const example = () => view().examples[state.example];

  function make(tag, options = {}, ...children) {
    const { style, attributes, ...properties } = options;
    const element = Object.assign(document.createElement(tag), properties);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    if (style) element.style.cssText = style;
    element.append(...children);
    return element;
  }

  // The text of a token, its marks for white space paler.
  function token(id, className = "") {
    const text = view().vocabulary[id] ?? `#${id}`;
    const span = make("span", { className: `token ${className}`.trim(), dir: "auto", title: `token ${id}` });
    for (const part of text.split(/([\u2423\u21b5\u21e5]+)/)) {
      if (!part) continue;
      span.append(/^[\u2423\u21b5\u21e5]/.test(part) ? make("span", { className: "white" }, part) : part);
    }
    return span;
  }

  const quoted = (id) => {
    const span = token(id);
    span.style.fontFamily = "ui-monospace, Menlo, Consolas, monospace";
    span.style.color = "var(--ink)";
    return span;
  };
  const outputOf = (decode) => example().others[decode] ?? example().output;
  const startsOf = (decode) => {
    let at = 0;
    return (example().accepted[decode] || []).map((n) => { const start = at; at += n; return start; });
  };
  const share = (value) => {
    const percent = value / 100;
    return percent >= 10 ? `${percent.toFixed(0)} %` : percent >= 0.1 ? `${percent.toFixed(1)} %` : "< 0.1 %";
  };
  // The lattice of a place, if this decode's output is still the one that was traced there.
  const latticeAt = (decode, start) => (start <= example().same[decode] ? example().lattice[start] : undefined);
  const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

  function fill(select, names, chosen) {
    select.replaceChildren(...names.map((name, value) => make("option", { value: String(value), textContent: name })));
    select.value = String(chosen);
  }

  function chooseTask(task) {
    Object.assign(state, { task, example: 0, step: 0 });
    state.decode = view().walked;
    $("ex-chosen").textContent = view().chosen;
    fill($("ex-example"), view().examples.map((e, i) => `${i + 1}: ${[...e.id].slice(0, 40).join("")}`), 0);
    if (!view().examples.length) {
      app.replaceChildren(make("p", { className: "note" }, "No example of these results has a step to walk."));
      return;
    }
    chooseExample(0);
  }

  function chooseExample(index) {
    state.example = index;
    const { prompt, references, accepted } = example();
    const decodes = view().decodes.map((d, i) => ({ name: d.name, i })).filter(({ i }) => accepted[i]);
    if (!accepted[state.decode]) state.decode = decodes[0].i;
    $("ex-decode").replaceChildren(...decodes.map(({ name, i }) => make("option", { value: String(i), textContent: name })));
    $("ex-decode").value = String(state.decode);
    const box = $("ex-prompt");
    box.replaceChildren();
    if (!prompt) box.append("The prompt is in the trace, which is not there.");
    else {
      box.append(prompt.head);
      if (prompt.leftOut) {
        box.append(make("em", {}, `\n[… ${prompt.leftOut.toLocaleString("en")} characters left out …]\n`), prompt.tail);
      }
    }
    $("ex-references").textContent = references.length ? `Reference: ${references.join("\nor: ")}` : "No reference.";
    chooseDecode(state.decode);
  }

  function chooseDecode(decode) {
    state.decode = decode;
    const ids = outputOf(decode), accepted = example().accepted[decode], starts = startsOf(decode);
    $("ex-output").replaceChildren(...accepted.map((n, step) => {
      const button = make("button", { type: "button", className: "block", onclick: () => go(step) });
      button.tabIndex = -1;
      for (let i = starts[step]; i < starts[step] + n && i < ids.length; i++) {
        button.append(token(ids[i], i > starts[step] ? "saved" : ""));
      }
      button.append(make("sub", {}, String(n)));
      button.setAttribute("aria-label", `Step ${step + 1}: ${plural(n, "token")} accepted`);
      return button;
    }));
    $("ex-range").max = String(accepted.length - 1);
    go(0);
  }

  function go(step) {
    const accepted = example().accepted[state.decode];
    state.step = Math.max(0, Math.min(step, accepted.length - 1));
    $("ex-range").value = String(state.step);
    const n = accepted[state.step], start = startsOf(state.decode)[state.step];
    $("ex-range").setAttribute("aria-valuetext", `step ${state.step + 1} of ${accepted.length}`);
    [...$("ex-output").children].forEach((block, i) => {
      const here = i === state.step;
      block.setAttribute("aria-pressed", String(here));
      block.tabIndex = here ? 0 : -1;
      if (here) {
        const box = $("ex-output");
        const top = block.offsetTop - box.offsetTop;
        if (top < box.scrollTop || top + block.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - 40;
      }
    });
    $("ex-status").textContent =
      `Step ${state.step + 1} of ${accepted.length} of ${view().decodes[state.decode].name}: at output token ${start + 1}, ` +
      `${plural(n, "token")} accepted.`;
    for (const [id, off] of [["ex-first", 0], ["ex-back", 0], ["ex-next", accepted.length - 1], ["ex-last", accepted.length - 1]]) {
      $(id).disabled = state.step === off;
    }
    drawDrafts(start);
    drawLattice(start);
    drawJoined(start);
  }

  // Which drafters had proposed a token: a letter in the colour of each.
  function marksOf(sources) {
    const marks = make("span", { className: "marks" });
    for (const place of sources) {
      const { name, colour } = view().sources[place];
      marks.append(make("abbr", { style: `color:${colour}`, title: name }, name[0].toUpperCase()));
    }
    return marks;
  }

  // Before and after the token at which a draft stopped, by the kind of acceptance; then comes what the output has there.
  const STOPS = {
    greedy: ["it has ", ", the base wants "],
    sampled: ["", " was not accepted; drawn instead: "],
    lossy: ["", " does not fit; the base’s likeliest is "],
  };

  function why({ ids, n, kind }, start, output, lattice) {
    const { h, k } = view();
    const cell = make("td", { className: "why" });
    if (start + n >= output.length) cell.append("the output ends here");
    else if (n >= ids.length) cell.append("accepted whole");
    else {
      const [before, after] = STOPS[kind];
      cell.append(`at slot ${n + 1} ${before}`, quoted(ids[n]), after, quoted(output[start + n]));
      if (lattice && n < h && output[start + n] === example().output[start + n]) {
        const rank = lattice.r[n];
        const p = rank >= 0 && rank < lattice.p[n].length ? ` (${share(lattice.p[n][rank])})` : "";
        cell.append(rank < 0 ? `: not in the top ${k} of the slot` : `: entry ${rank + 1} of the slot${p}`);
      }
    }
    return cell;
  }

  function draftRow(draft, start, lattice, slots) {
    const { name, colour, ids, n, walked, origins } = draft, className = walked ? "walked" : "";
    const output = draft.added ? example().output : outputOf(draft.index);
    const head = make("th", { scope: "row" }, make("span", { className: "swatch", style: `color:${colour}` }, "●"), ` ${name}`);
    head.firstChild.setAttribute("aria-hidden", "true");
    const row = make("tr", { className }, head, make("td", {}, String(n)));
    ids.forEach((id, slot) => {
      const kind = slot < n ? "accepted" : start + n >= output.length || slot > n ? "after" : "refused";
      const cell = make("td", { className: `token-${kind}` }, token(id));
      if (origins && origins[slot]) cell.append(marksOf(origins[slot]));
      row.append(cell);
    });
    for (let slot = ids.length; slot < slots; slot++) row.append(make("td", {}));
    row.append(why(draft, start, output, lattice));
    return row;
  }

  // What is put up at a place: by decode that stopped there, the unrescored draft and the oracle path from the lattice.
  function draftsAt(start) {
    const { decodes, h } = view(), found = [], elsewhere = [];
    const lattice = latticeAt(state.decode, start);
    decodes.forEach((decode, i) => {
      const accepted = example().accepted[i];
      if (!accepted) return;
      const step = startsOf(i).indexOf(start);
      const sameSoFar = i === state.decode || (start <= example().same[i] && start <= example().same[state.decode]);
      if (step < 0 || !sameSoFar) { elsewhere.push(decode.name); return; }
      const ids = example().drafts[i][step];
      const origins = example().origins[i] && example().origins[i][step];
      found.push({ ...decode, ids, n: accepted[step], walked: i === state.decode, index: i, origins });
    });
    if (lattice) {
      const output = example().output;
      const best = lattice.t.map((slot) => slot[0]);
      const reach = (ids) => { let n = 1; while (n < ids.length && start + n < output.length && ids[n] === output[start + n]) n++; return n; };
      if (!found.some((d) => d.rescorer === "none" && d.p === 1)) {
        found.unshift({ name: "unrescored draft", colour: "#7d8590", ids: best, n: reach(best), rescorer: "none", kind: "greedy", added: true });
      }
      if (!found.some((d) => d.rescorer === "oracle")) {
        let run = 1;
        while (run < h && start + run < output.length && lattice.r[run] >= 0) run++;
        const path = best.map((id, slot) => (slot < run ? output[start + slot] : id));
        found.push({ name: "oracle path", colour: "#b8860b", ids: path, n: run, rescorer: "oracle", kind: "greedy", added: true });
      }
    }
    return { found, elsewhere, lattice };
  }

  function drawDrafts(start) {
    const { h } = view(), output = outputOf(state.decode);
    const { found, elsewhere, lattice } = draftsAt(start);
    const slots = Math.max(h, ...found.map((d) => d.ids.length));
    const header = make("tr", {}, make("th", { scope: "col" }, "draft of"), make("th", { scope: "col" }, "accepted"));
    for (let slot = 1; slot <= slots; slot++) header.append(make("th", { scope: "col" }, `slot ${slot}`));
    header.append(make("th", { scope: "col" }, "why it stopped"));
    const base = make("tr", { className: "base" }, make("th", { scope: "row" }, view().decodes[state.decode].kind === "greedy" ? "base model’s own" : "this decode’s own"), make("td", {}, ""));
    for (let slot = 0; slot < slots; slot++) {
      base.append(make("td", {}, start + slot < output.length ? token(output[start + slot]) : ""));
    }
    base.append(make("td", { className: "why" }, "what the output goes on with"));
    const rows = found.map((d) => draftRow(d, start, lattice, slots));
    $("ex-drafts").replaceChildren(make("thead", {}, header), make("tbody", {}, base, ...rows));
    $("ex-elsewhere").textContent = elsewhere.length
      ? `Each decode walks its own places. Not shown, since their decodes did not stop here: ${elsewhere.join(", ")}.`
      : "All decodes stopped at this place.";
  }

  function drawLattice(start) {
    const { h, k, shown, lattices } = view();
    const { found, lattice } = draftsAt(start);
    const table = $("ex-lattice");
    if (!lattice) {
      table.replaceChildren();
      $("ex-lattice-note").textContent = lattices
        ? "The trace has no lattice for this place: this decode’s output is another one here."
        : "The lattices are in the trace, which is not there; the top of the page says how to record it again.";
      return;
    }
    const output = example().output;
    const header = make("tr", {}, make("th", { scope: "col" }, "entry"));
    for (let slot = 1; slot <= h; slot++) header.append(make("th", { scope: "col" }, `slot ${slot}`));
    const rows = [];
    for (let entry = 0; entry < shown; entry++) {
      const row = make("tr", {}, make("th", { scope: "row" }, String(entry + 1)));
      for (let slot = 0; slot < h; slot++) {
        const id = lattice.t[slot][entry], p = lattice.p[slot][entry];
        const cell = make("td", { style: `background: rgb(var(--heat) / ${(0.55 * Math.sqrt(p / 10000)).toFixed(3)})` }, token(id));
        const wanted = start + slot < output.length && id === output[start + slot];
        if (wanted) cell.className = "wanted";
        cell.append(make("span", { className: "share" }, `${share(p)}${wanted ? " ✓" : ""}`));
        const dots = make("span", { className: "dots" });
        for (const d of found) {
          if (d.ids[slot] === id) dots.append(make("span", { style: `color:${d.colour}`, title: d.name }, d.rescorer.startsWith("oracle") ? "★" : "●"));
        }
        cell.append(dots);
        row.append(cell);
      }
      rows.push(row);
    }
    $("ex-lattice").replaceChildren(make("thead", {}, header), make("tbody", {}, ...rows));
    const cut = shown < k ? ` The ${shown} likeliest of ${k} entries are shown.` : "";
    $("ex-lattice-note").textContent =
      "Columns are the heads, rows their choices from the likeliest down, darker the likelier. Framed with ✓: what greedy decoding " +
      "goes on with. Dots: which drafts of the table above pass through (★ the oracle). The top row is the unrescored draft." + cut;
  }

  // What several drafters proposed along the tokens that were accepted, of each set of them.
  function drawJoined(start) {
    const { sources, decodes, notices } = view();
    const { accepted, among, joined, output, same } = example();
    const box = $("ex-joined");
    box.replaceChildren();
    const sets = [...new Set(among.filter((_, i) => among[i] && accepted[i] && start <= same[i] && startsOf(i).includes(start)))];
    const own = among[state.decode];
    if (start <= same[state.decode]) for (const set of sets.sort((a, b) => (b === own) - (a === own))) {
      const slots = (joined[set] || {})[start];
      if (!slots) continue;
      const names = decodes.filter((_, i) => among[i] === set && startsOf(i).includes(start)).map((d) => d.name);
      const header = make("tr", {}, make("th", { scope: "col" }, "proposed"));
      slots.forEach((_, i) => header.append(make("th", { scope: "col" }, `slot ${i + 2}`)));
      const rows = [];
      for (let place = 0; place < Math.max(...slots.map((slot) => slot.length)); place++) {
        const row = make("tr", {}, make("th", { scope: "row" }, String(place + 1)));
        slots.forEach((slot, i) => {
          const cell = make("td", {});
          if (place < slot.length) {
            const [id, origins, p] = slot[place];
            const wanted = start + i + 1 < output.length && id === output[start + i + 1];
            if (wanted) cell.className = "wanted";
            if (origins.length === 1) cell.style.boxShadow = `inset 4px 0 ${sources[origins[0]].colour}`;
            cell.append(token(id), make("span", { className: "share" }, `${p === null ? "" : share(p)}${wanted ? " ✓" : ""}`), marksOf(origins));
          }
          row.append(cell);
        });
        rows.push(row);
      }
      const legend = make("p", { className: "note" }, `${set}, of ${names.join("; ")}. Who proposed it, here and of the accepted tokens above: `);
      for (const place of new Set(slots.flat().flatMap(([, origins]) => origins))) {
        legend.append(marksOf([place]), ` ${sources[place].name} `);
      }
      const table = make("table", { className: "lattice" }, make("thead", {}, header), make("tbody", {}, ...rows));
      const scroll = make("div", { className: "scroll", tabIndex: 0 }, table);
      scroll.setAttribute("role", "region");
      scroll.setAttribute("aria-label", `What ${set} proposed`);
      box.append(legend, scroll);
    }
    $("ex-joined-part").hidden = !box.children.length && !notices.length;
    $("ex-joined-note").textContent = box.children.length
      ? "Each column holds what the drafters proposed after the accepted tokens before it, the likeliest of each; a bar in " +
        "colour marks what one drafter alone proposed, the percentage is the head’s. Framed with ✓: what the base model goes on with."
      : notices.join(" ");
  }

  if (!blocks.length || !app) return;
  fill($("ex-task"), blocks.map((block) => block.dataset.label), 0);
  app.hidden = false;
  chooseTask(0);
  $("ex-task").addEventListener("change", (event) => chooseTask(Number(event.target.value)));
  $("ex-example").addEventListener("change", (event) => chooseExample(Number(event.target.value)));
  $("ex-decode").addEventListener("change", (event) => chooseDecode(Number(event.target.value)));
  $("ex-range").addEventListener("input", (event) => go(Number(event.target.value)));
  $("ex-first").addEventListener("click", () => go(0));
  $("ex-back").addEventListener("click", () => go(state.step - 1));
  $("ex-next").addEventListener("click", () => go(state.step + 1));
  $("ex-last").addEventListener("click", () => go(Infinity));
  app.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || ["SELECT", "INPUT"].includes(event.target.tagName)) return;
    const to = { ArrowLeft: state.step - 1, ArrowRight: state.step + 1, Home: 0, End: Infinity }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go(to);
    if (event.target.classList.contains("block")) $("ex-output").children[state.step].focus();
  });
})();
