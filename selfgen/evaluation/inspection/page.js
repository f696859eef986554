"use strict";
const tip = document.getElementById("tip");
let shown = null;

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function barOf(token) {
  return document.getElementById(token.id + "-bar");
}

function hide() {
  tip.hidden = true;
  if (!shown) return;
  shown.classList.remove("on");
  shown.removeAttribute("aria-describedby");
  barOf(shown)?.classList.remove("on");
  shown = null;
}

function show(token) {
  hide();
  shown = token;
  const [title, ...lines] = token.dataset.tip.split("\n");
  const list = document.createElement("dl");
  for (const line of lines) {
    const [name, value] = line.split("\t");
    list.append(element("dt", name), element("dd", value));
  }
  tip.replaceChildren(element("b", title), list);
  tip.hidden = false;
  token.classList.add("on");
  token.setAttribute("aria-describedby", "tip");
  barOf(token)?.classList.add("on");
  const at = token.getBoundingClientRect(), own = tip.getBoundingClientRect(), wide = document.documentElement.clientWidth;
  const below = at.bottom + own.height + 12 < window.innerHeight || at.top < own.height + 12;
  tip.style.left = Math.max(8, Math.min(at.left, wide - own.width - 8)) + window.scrollX + "px";
  tip.style.top = (below ? at.bottom + 8 : at.top - own.height - 8) + window.scrollY + "px";
}

// One stop of the Tab key for each list of tokens; arrows go on from there.
function goTo(token) {
  for (const other of token.parentElement.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  token.tabIndex = 0;
  token.focus();
}

for (const list of document.querySelectorAll(".tokens")) {
  const tokens = [...list.querySelectorAll("[data-tip]")];
  const ofEvent = event => event.target.closest("[data-tip]");
  list.addEventListener("focusin", event => { if (ofEvent(event)) show(ofEvent(event)); });
  list.addEventListener("focusout", hide);
  list.addEventListener("click", event => { if (ofEvent(event)) goTo(ofEvent(event)); });
  list.addEventListener("pointerover", event => {
    if (event.pointerType === "mouse" && ofEvent(event)) show(ofEvent(event));
  });
  list.addEventListener("pointerout", event => {
    if (event.pointerType !== "mouse") return;
    const focused = document.activeElement;
    if (focused?.dataset.tip) show(focused); else hide();
  });
  list.addEventListener("keydown", event => {
    const here = tokens.indexOf(ofEvent(event));
    const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (here < 0 || next === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    goTo(tokens[Math.max(0, Math.min(next, tokens.length - 1))]);
  });
}

for (const chart of document.querySelectorAll(".chart")) {
  const tokens = document.getElementById(chart.dataset.of).querySelectorAll("[data-tip]");
  const under = event => {
    const box = chart.getBoundingClientRect(), place = Math.floor((event.clientX - box.left) / box.width * tokens.length);
    return tokens[Math.max(0, Math.min(place, tokens.length - 1))];
  };
  chart.addEventListener("pointermove", event => { if (event.pointerType === "mouse") show(under(event)); });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("click", event => goTo(under(event)));
}

document.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
window.addEventListener("resize", () => { if (shown) show(shown); });  // as a phone does when its bars come and go
