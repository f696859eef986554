// What a page of `selfgen inspect` looks like and does, in each frame; written into #found as JSON.
"use strict";

function rgb(color) {
  return color.match(/[\d.]+/g).map(Number);
}

function luminance([r, g, b]) {  // WCAG 2.2
  const [x, y, z] = [r, g, b].map(one => one / 255).map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
}

function background(element) {
  for (let one = element; one; one = one.parentElement) {
    const color = rgb(getComputedStyle(one).backgroundColor);
    if (color.length === 3 || color[3] > 0) return color;
  }
  return [255, 255, 255];
}

function contrast(element) {
  const [one, other] = [rgb(getComputedStyle(element).color), background(element)].map(luminance);
  return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
}

function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, errors = [];
  view.addEventListener("error", event => errors.push(event.message));
  const tip = page.getElementById("tip");
  const title = () => tip.hidden ? null : tip.firstChild.textContent;
  const lists = [...page.querySelectorAll("section")[0].querySelectorAll(".tokens")];
  const tokens = [...lists[0].querySelectorAll("[data-tip]")];
  const press = key => page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const point = (type, target, more) => target.dispatchEvent(new view.PointerEvent(type, { bubbles: true, pointerType: "mouse", ...more }));

  const found = { errors, width: view.innerWidth, scrolls_to: page.documentElement.scrollWidth };
  found.brightness = luminance(background(page.body));
  found.contrasts = Object.fromEntries(
    ["body", ".quiet", "section dt", "section small", "summary", ".t", ".agree", ".differ", ".differ s", ".slip", ".pass", ".after", ".strip span"]
      .map(name => [name, page.querySelector(name)]).filter(([, one]) => one).map(([name, one]) => [name, contrast(one)]));
  found.stops = lists.map(list => list.querySelectorAll('[tabindex="0"]').length);

  tokens[0].focus();
  found.at_first = title();
  found.contrasts["#tip"] = contrast(tip);
  found.contrasts["#tip dt"] = contrast(tip.querySelector("dt"));
  found.described = tokens[0].getAttribute("aria-describedby") === "tip";
  press("ArrowRight");
  found.after_right = title();
  press("End");
  found.after_end = title();
  press("Escape");
  found.after_escape = title();
  tokens[1].click();
  found.after_tap = title();
  found.tip_inside = tokens.map(token => {
    token.focus();
    const box = tip.getBoundingClientRect();
    return box.left >= 0 && box.right <= view.innerWidth;
  });
  page.activeElement.blur();
  point("pointerover", tokens[0]);
  found.after_hover = title();
  point("pointerout", tokens[0]);
  const chart = page.querySelector(".chart"), box = chart.getBoundingClientRect();
  chart.dispatchEvent(new view.MouseEvent("click", { clientX: box.left + 1, clientY: box.top + 5, bubbles: true }));
  found.after_chart = title();
  view.dispatchEvent(new view.Event("resize"));
  found.after_resize = title();
  (lists[0].querySelector(".differ") ?? tokens[0]).focus();
  view.scrollTo(0, 0);
  return found;
}

window.addEventListener("load", () => {
  const found = { dark: matchMedia("(prefers-color-scheme: dark)").matches };
  found.frames = [...document.querySelectorAll("iframe")].map(look);
  document.getElementById("found").textContent = JSON.stringify(found);
});
