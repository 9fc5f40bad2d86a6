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
// A large paste comes in pieces: the server ends a tab whose message is larger than it takes (MAX_MESSAGE of
// server.py; JSON makes up to six bytes of a character).
const PIECE = 131072;
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (message) {
  const [kind, text] = message.length > PIECE ? JSON.parse(message) : [];
  if (kind !== "stdin") {
    send.call(this, message);
    return;
  }
  for (let from = 0, to; from < text.length; from = to) {
    to = from + PIECE;
    if (/[\ud800-\udbff]/.test(text.charAt(to - 1))) {
      to -= 1; // the first half of a character stays with its second
    }
    send.call(this, JSON.stringify(["stdin", text.slice(from, to)]));
  }
};
// Keys go to the panel from its first picture on, without a click into it.
new MutationObserver((_, observer) => {
  const input = document.querySelector(".xterm-helper-textarea");
  if (document.body.classList.contains("-first-byte") && input) {
    input.focus();
    observer.disconnect();
  }
}).observe(document.body, { attributes: true, attributeFilter: ["class"] });
