"use strict";
(() => {
  const status = document.getElementById("status");
  let timer = 0;

  function say(text) {
    status.textContent = text;
    clearTimeout(timer);
    timer = setTimeout(() => { status.textContent = ""; }, 4000);
  }

  function keyOf(row, column) {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    return { number: value === undefined ? null : Number(value), text: cell.textContent.trim() };
  }

  // Unknown cells (a dash) stay last whichever way a column is sorted.
  function compare(a, b, sign) {
    const gone = (key) => key.number === null && key.text === "–";
    if (gone(a) || gone(b)) return gone(a) - gone(b);
    if (a.number !== null && b.number !== null) return sign * (a.number - b.number);
    return sign * a.text.localeCompare(b.text, "en", { numeric: true });
  }

  function sort(table, column) {
    const heads = [...table.tHead.rows[0].cells];
    const ascending = heads[column].getAttribute("aria-sort") !== "ascending";
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => ({ row, key: keyOf(row, column) }));
    rows.sort((a, b) => compare(a.key, b.key, ascending ? 1 : -1));
    body.append(...rows.map((found) => found.row));
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", ascending ? "ascending" : "descending");
    say(`Sorted by ${heads[column].textContent.trim()}, ${ascending ? "ascending" : "descending"}`);
  }

  function cells(table) {
    return [...table.rows].map((row) => [...row.cells].map((cell) => ({
      text: cell.textContent.replace(/\s+/g, " ").trim(), number: cell.dataset.value !== undefined,
    })));
  }

  // A spreadsheet would run a text that starts like a formula; an apostrophe keeps it text.
  function tsv(table) {
    const plain = (cell) => (!cell.number && /^[=+@-]/.test(cell.text) ? "'" + cell.text : cell.text);
    return cells(table).map((row) => row.map(plain).join("\t")).join("\n") + "\n";
  }

  function markdown(table) {
    const names = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };
    const escape = (text) => text.replace(/[&<>]/g, (char) => names[char]).replace(/([\\`*_[\]|#~])/g, "\\$1");
    const lines = cells(table).map((row) => "| " + row.map((cell) => escape(cell.text)).join(" | ") + " |");
    const rule = [...table.tHead.rows[0].cells].map((head) => (head.className === "number" ? "---:" : "---"));
    lines.splice(1, 0, "| " + rule.join(" | ") + " |");
    return lines.join("\n") + "\n";
  }

  async function copy(text, what) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Pages opened from disk have no clipboard in some browsers; a selection has.
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      if (!done) return say("The browser refused to copy");
    }
    return say(`Copied as ${what}`);
  }

  function button(label, description, action) {
    const found = document.createElement("button");
    found.type = "button";
    found.textContent = label;
    found.setAttribute("aria-label", description);
    found.addEventListener("click", action);
    return found;
  }

  // A link to a table that is folded away opens it.
  function unfold(hash) {
    const target = hash.length > 1 ? document.getElementById(decodeURIComponent(hash.slice(1))) : null;
    const fold = target && target.closest("details");
    if (fold) {
      fold.open = true;
      target.scrollIntoView();
    }
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (link) unfold(link.hash);
  });

  for (const table of document.querySelectorAll("table")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const sorter = document.createElement("button");
      sorter.type = "button";
      sorter.append(...head.childNodes);
      sorter.addEventListener("click", () => sort(table, column));
      head.append(sorter);
    });
    const name = table.caption.textContent.trim();
    const tools = document.createElement("div");
    tools.className = "tools";
    tools.append(
      button("Copy as TSV", `Copy as TSV: ${name}`, () => copy(tsv(table), "TSV")),
      button("Copy as Markdown", `Copy as Markdown: ${name}`, () => copy(markdown(table), "Markdown")),
    );
    table.closest(".scroll").after(tools);
  }
  unfold(location.hash);
})();
