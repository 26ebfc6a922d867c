// SPDX-License-Identifier: AGPL-3.0-or-later
// Signs in and out, and shows the section that the address names.

import { get, signIn, signOut, token, whenSignedOut } from "./api.js";
import { blocksView } from "./blocks.js";
import { alertPlace, h, newId, setText } from "./dom.js";
import { roomView } from "./room.js";
import { roomsView } from "./rooms.js";
import { serversView } from "./servers.js";
import { foreign } from "./words.js";

const main = document.getElementById("main");
const navigation = document.getElementById("navigation");
const account = document.getElementById("account");
const who = document.getElementById("who");

let view = null;
let status = null;

function leave() {
  view?.end();
  view = null;
  for (const dialog of document.querySelectorAll("dialog")) dialog.close();
}

function show(element, title) {
  main.replaceChildren(element);
  document.title = `${title} · Sticky events`;
}

function route() {
  if (status === null) return;
  leave();
  const [section, ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  view = viewOf(section, rest.join("/"));
  show(view.element, view.heading.textContent);
  for (const link of navigation.querySelectorAll("a")) {
    if (location.hash.split("/")[1] === link.hash.split("/")[1]) link.setAttribute("aria-current", rest.length > 0 ? "true" : "page");
    else link.removeAttribute("aria-current");
  }
}

function viewOf(section, rest) {
  if (section === "servers") return serversView();
  if (section === "blocks") return blocksView();
  const roomId = decoded(rest);
  if (section === "rooms" && roomId !== "") return roomView(roomId, status.server_name);
  if (location.hash !== "#/rooms") history.replaceState(null, "", "#/rooms");
  return roomsView();
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}

function enter(newStatus) {
  status = newStatus;
  navigation.hidden = account.hidden = false;
  setText(who, foreign(status.user_id, 255));
  route();
}

function showSignIn(reason = "") {
  leave();
  status = null;
  navigation.hidden = account.hidden = true;
  const id = newId();
  const problem = alertPlace();
  const input = h("input", {
    id,
    type: "password",
    required: true,
    autocomplete: "off",
    autocapitalize: "off",
    spellcheck: "false",
    "aria-describedby": `${id}-hint`,
  });
  const submitButton = h("button", { type: "submit", class: "primary" }, "Sign in");
  const submit = async (event) => {
    event.preventDefault();
    if (submitButton.disabled) return;
    submitButton.disabled = true;
    problem.show("");
    try {
      enter(await signIn(input.value.trim()));
      view.heading.focus();
    } catch (error) {
      problem.show(error.message);
      input.focus();
    } finally {
      submitButton.disabled = false;
    }
  };
  show(
    h(
      "div",
      { class: "view sign-in" },
      h("h1", { tabindex: "-1" }, "Sign in"),
      h("p", {}, "See the sticky events of this server, and decide on them."),
      h(
        "form",
        { class: "panel", on: { submit } },
        problem.element,
        h("label", { for: id }, "Access token of a server admin"),
        input,
        h(
          "p",
          { class: "hint", id: `${id}-hint` },
          "The one that Synapse’s own admin API takes. It stays in this tab, and is gone when you sign out or close it.",
        ),
        submitButton,
      ),
    ),
    "Sign in",
  );
  problem.show(reason);
  input.focus();
}

window.addEventListener("hashchange", () => {
  route();
  view?.heading.focus();
});
document.getElementById("skip").addEventListener("click", () => {
  const heading = main.querySelector("h1");
  heading?.focus();
  heading?.scrollIntoView();
});
document.getElementById("sign-out").addEventListener("click", () => signOut());
whenSignedOut(showSignIn);

async function begin() {
  if (token() === null) {
    showSignIn();
    return;
  }
  try {
    enter(await get("status"));
  } catch (error) {
    if (error.status === 401) return;
    showSignIn(error.message);
  }
}

begin();
