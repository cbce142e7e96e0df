// Filters and sorts the matrix of claims. Without it the page shows every claim, in the order of their ids.
"use strict";

const matrix = document.getElementById("matrix");
const body = matrix.tBodies[0];
const rows = Array.from(body.rows);
const heads = Array.from(matrix.tHead.rows[0].cells);
const form = document.getElementById("filters");
const FIRST_SUBJECT = 4; // claim, statement, kind, needed
const ORDER = { r: 0, h: 1, n: 2 };
const collator = new Intl.Collator("en", { numeric: true });

const cells = (row) => Array.from(row.cells).slice(FIRST_SUBJECT);
const verdict = (cell) => cell.dataset.v || "";

function shows(row, wanted) {
  if (wanted.experiment && row.dataset.e !== wanted.experiment) return false;
  if (wanted.kind && row.cells[2].textContent.trim() !== wanted.kind) return false;
  const text = (row.cells[0].textContent + " " + row.cells[1].textContent).toLowerCase();
  if (!wanted.words.toLowerCase().split(/\s+/).every((word) => text.includes(word))) return false;
  const judged = (wanted.subject ? [cells(row)[Number(wanted.subject)]] : cells(row)).filter(verdict);
  if (wanted.verdict === "d") return new Set(cells(row).map((cell) => verdict(cell)[0]).filter((v) => v === "h" || v === "r")).size > 1;
  if (wanted.verdict) return judged.some((cell) => verdict(cell).includes(wanted.verdict));
  return !wanted.subject || judged.length > 0;
}

function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  let shown = 0;
  for (const row of rows) {
    row.hidden = !shows(row, wanted);
    shown += !row.hidden;
  }
  document.getElementById("count").textContent = `${shown} of ${rows.length} claims`;
}

function compare(kind, column) {
  if (kind !== "verdict") return (a, b) => collator.compare(a.cells[column].textContent.trim(), b.cells[column].textContent.trim());
  const place = (row) => ORDER[verdict(row.cells[column])[0]] ?? 3;
  const support = (row) => Number((/support ([\d.]+)/.exec(row.cells[column].textContent) ?? [0, 2])[1]);
  return (a, b) => place(a) - place(b) || support(a) - support(b);
}

function sort(head, column) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const ordered = rows.slice().sort(compare(head.dataset.sort, column));
  body.append(...(down ? ordered.reverse() : ordered));
}

heads.forEach((head, column) => {
  if (!head.dataset.sort) return;
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  button.addEventListener("click", () => sort(head, column));
  head.append(button);
});
form.hidden = false;
for (const kind of ["input", "change"]) form.addEventListener(kind, filter); // not every tool fires both
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(filter));
filter();
