"use strict";
// The page reads in full without this script; it adds sorting, the method filter and the seed switch.

const each = (root, selector, act) => root.querySelectorAll(selector).forEach(act);

// Sorting: numbers by data-value, an empty value always last; the first click on a number column puts its best (or largest) on top.
each(document, "table.sortable", (table) => {
  each(table, "thead th", (head) => {
    const column = head.cellIndex;
    const numeric = head.classList.contains("num");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.setAttribute("aria-label", "sort by " + head.textContent.trim().replace(/\s+/g, " "));
    head.append(button);
    head.dataset.sortable = "";
    head.addEventListener("click", (event) => {
      if (event.target.closest("a")) return;
      const first = head.dataset.best || (numeric ? "descending" : "ascending");
      const other = first === "descending" ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      each(table, "thead th", (sibling) => sibling.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [left, right] = [value(a), value(b)];
        if (left === "" || right === "") return (left === "") - (right === "");
        if (!numeric) return sign * left.localeCompare(right, undefined, { numeric: true });
        return sign * (Number(left) - Number(right) || 0);
      });
      table.tBodies[0].append(...rows);
    });
  });
});

// The filter hides a method in tables (rows and columns), figures, pictures and texts alike; a row of two methods needs both.
const boxes = [...document.querySelectorAll("[data-toggle-method]")];
const apply = () => {
  const off = new Set(boxes.filter((box) => !box.checked).map((box) => box.dataset.toggleMethod));
  each(document, "[data-method]", (element) => {
    element.style.display = element.dataset.method.split(" ").some((method) => off.has(method)) ? "none" : "";
  });
};
boxes.forEach((box) => box.addEventListener("change", apply));
apply(); // a browser may restore unchecked boxes on reload
for (const [selector, checked] of [["[data-all]", true], ["[data-none]", false]]) {
  each(document, selector, (button) => {
    button.hidden = boxes.length < 3;
    button.addEventListener("click", () => { boxes.forEach((box) => { box.checked = checked; }); apply(); });
  });
}

// One seed at a time: the first is shown in the markup already, so the page reads the same without the script.
each(document, "[data-samples]", (samples) => {
  each(samples, ".seeds-switch", (choice) => { choice.hidden = false; });
  each(samples, "[data-show-seed]", (button) => button.addEventListener("click", () => {
    each(samples, "[data-show-seed]", (other) => other.setAttribute("aria-pressed", String(other === button)));
    each(samples, "[data-seed]", (shot) => { shot.hidden = shot.dataset.seed !== button.dataset.showSeed; });
  }));
  each(samples, "[data-search]", (box) => {
    box.hidden = false;
    box.addEventListener("input", () => {
      const wanted = box.value.toLowerCase();
      each(samples, ".card li", (text) => { text.hidden = !text.textContent.toLowerCase().includes(wanted); });
    });
  });
});
