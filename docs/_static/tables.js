// Says of each table that is wider than its place that it scrolls, and lets the keyboard scroll it.
const markTables = () => {
  for (const wrapper of document.querySelectorAll(".table-wrapper")) {
    const scrolls = wrapper.scrollWidth > wrapper.clientWidth + 1;
    let hint = wrapper.querySelector(".scrolls-hint");
    wrapper.classList.toggle("scrolls", scrolls);
    if (scrolls && !hint) {
      hint = document.createElement("p");
      hint.className = "scrolls-hint";
      hint.textContent = "This table scrolls \u2192";
      wrapper.prepend(hint);
      wrapper.tabIndex = 0;
    } else if (!scrolls && hint) {
      hint.remove();
      wrapper.removeAttribute("tabindex");
    }
  }
};
addEventListener("load", markTables);
addEventListener("resize", markTables);
