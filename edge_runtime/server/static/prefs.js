// What this browser remembers between visits, apart from chats. If storage is forbidden, nothing is remembered.

function attempt(work) {
  try {
    return work();
  } catch {
    return null;
  }
}

export const recall = (name) => attempt(() => localStorage.getItem(name));

export function remember(name, value) {
  attempt(() => (value ? localStorage.setItem(name, value) : localStorage.removeItem(name)));
}

const KEY = "api-key";

// A key stays in its tab unless the user wants it kept longer.
export const recallKey = () => attempt(() => sessionStorage.getItem(KEY)) ?? recall(KEY) ?? "";

export const keepsKey = () => Boolean(recall(KEY));

export function rememberKey(key, keep) {
  attempt(() => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)));
  remember(KEY, keep ? key : "");
}
