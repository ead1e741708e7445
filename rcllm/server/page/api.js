// Asks the server. The key lives in this module's memory alone.

let key = "";
let asking = null; // one dialog at a time, whoever needs the key

/** An answer that says why there is none. */
export class Refusal extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The JSON of an address; asks for a key where one is needed. Throws Refusal. */
export async function ask(path, body) {
  for (;;) {
    const used = key;
    const headers = { ...(used && { authorization: `Bearer ${used}` }), ...(body && { "content-type": "application/json" }) };
    const options = body ? { method: "POST", body: JSON.stringify(body), headers } : { headers };
    const reply = await fetch(path, options);
    const told = await reply.json().catch(() => ({}));
    if (reply.ok) return told;
    if (reply.status !== 401) {
      const error = told.error ?? {};
      throw new Refusal(reply.status, error.code ?? "", error.message ?? `status ${reply.status}`);
    }
    if (used === key) await keyFromPerson(used !== "");
  }
}

function keyFromPerson(wasWrong) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    document.getElementById("key-wrong").textContent = wasWrong ? "This key does not fit." : "";
    field.value = "";
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => {
      key = field.value.trim();
      field.value = "";
      asking = null;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}
