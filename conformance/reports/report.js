// Show cases of one verdict only; findings first where there are some.
const buttons = [...document.querySelectorAll("button[data-show]")];
function show(name) {
  for (const button of buttons) {
    button.setAttribute("aria-pressed", button.dataset.show === name);
  }
  for (const one of document.querySelectorAll(".case")) {
    one.hidden = name !== "all" && !one.classList.contains(name);
  }
  for (const section of document.querySelectorAll("section")) {
    section.hidden = !section.querySelector(".case:not([hidden])");
  }
}
for (const button of buttons) {
  button.addEventListener("click", () => show(button.dataset.show));
}
const linked = location.hash && document.querySelector(CSS.escape ? "#" + CSS.escape(location.hash.slice(1)) : location.hash);
show(!linked && buttons.some((b) => b.dataset.show === "fail") ? "fail" : "all");
if (linked) {
  linked.open = true;
  linked.scrollIntoView();
}
