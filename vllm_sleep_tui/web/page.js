// The key stands behind the # of the link, which a browser sends to nobody. It is kept for this tab and this
// port alone, and taken out of the address, so that no history and no screenshot has it.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname);
}
const token = sessionStorage.getItem("token");
const terminal = document.getElementById("terminal");
if (token) {
  terminal.dataset.sessionWebsocketUrl = `ws://${location.host}/ws/${encodeURIComponent(token)}`;
  terminal.classList.add("textual-terminal"); // what textual.js looks for once the page is there
} else {
  document.body.classList.add("-no-token");
}
// Keys go to the panel from its first picture on, without a click into it.
new MutationObserver((_, observer) => {
  const input = document.querySelector(".xterm-helper-textarea");
  if (document.body.classList.contains("-first-byte") && input) {
    input.focus();
    observer.disconnect();
  }
}).observe(document.body, { attributes: true, attributeFilter: ["class"] });
