// Chats and their files, kept in this browser: IndexedDB, nothing else.
//
// A chat is `{id, title, updated, messages}`; a message names its files by id. Files are stored separately, so that
// saving a chat while an answer grows does not write its pictures again.

const NAME = "edge-runtime";
let opened;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("chats", { keyPath: "id" }).createIndex("updated", "updated");
      request.result.createObjectStore("files", { keyPath: "id" }).createIndex("chat", "chat");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

/** Do something in one transaction; resolves with the result of the request it returns, once all is written. */
async function transact(stores, mode, work) {
  const transaction = (await database()).transaction(stores, mode);
  return new Promise((resolve, reject) => {
    const request = work(transaction);
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

/** All chats, newest first. */
export async function allChats() {
  const chats = await transact("chats", "readonly", (t) => t.objectStore("chats").index("updated").getAll());
  return chats.reverse();
}

export function saveChat(chat) {
  return transact("chats", "readwrite", (t) => t.objectStore("chats").put(chat));
}

/** Store files of a chat: `{id, chat, name, type, blob}`. */
export function saveFiles(files) {
  return transact("files", "readwrite", (t) => {
    for (const file of files) t.objectStore("files").put(file);
  });
}

export function filesOf(chat) {
  return transact("files", "readonly", (t) => t.objectStore("files").index("chat").getAll(chat));
}

/** Delete a chat and its files, together or not at all. */
export function deleteChat(id) {
  return transact(["chats", "files"], "readwrite", (t) => {
    t.objectStore("chats").delete(id);
    t.objectStore("files").index("chat").openKeyCursor(IDBKeyRange.only(id)).onsuccess = ({ target }) => {
      const cursor = target.result;
      if (!cursor) return;
      t.objectStore("files").delete(cursor.primaryKey);
      cursor.continue();
    };
  });
}

export function deleteEverything() {
  return transact(["chats", "files"], "readwrite", (t) => {
    t.objectStore("chats").clear();
    t.objectStore("files").clear();
  });
}
