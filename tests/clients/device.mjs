// SPDX-License-Identifier: AGPL-3.0-or-later
//
// One device of a user, with matrix-js-sdk.
//
// Each line of the input is a command in JSON: `{"do": name, ...arguments}`. For each there is a line
// of output, in the same order: `{"result": ...}` or `{"error": {"name", "errcode", "message"}}`.
// The process ends when its input does. What the SDK logs goes to the standard error.
//
// Nothing of a browser's is replaced: the SDK takes fetch, WebCrypto and WebAssembly from Node, and
// does without IndexedDB and WebRTC. A MatrixRTC session never touches media itself.

import { createInterface } from "node:readline";
import { format } from "node:util";

for (const method of ["trace", "debug", "log", "info", "warn", "error"]) {
    console[method] = (...parts) => process.stderr.write(`${method} ${format(...parts)}\n`);
}

const { createClient, ClientEvent, KnownMembership, SyncState } = await import("matrix-js-sdk");
const { MatrixRTCSessionEvent } = await import("matrix-js-sdk/lib/matrixrtc/index.js");
const { RoomStickyEventsEvent } = await import("matrix-js-sdk/lib/models/room-sticky-events.js");
const { SlidingSync } = await import("matrix-js-sdk/lib/sliding-sync.js");

// As clients do; shorter, so that a device that was told to stop has soon done so.
const LONG_POLL_MS = 10_000;
const TRANSPORT = { type: "livekit", livekit_service_url: "https://sfu.example.org" };

let client;
let options;
/** Ends the requests that are under way. */
let cut = new AbortController();
/** What requests wait for. */
let network = { promise: Promise.resolve() };
/** What the SDK said of sticky events, by room. */
const changes = new Map();
/** Whose media keys the SDK gave us, by room. */
const keys = new Map();

async function fetchOverNetwork(resource, request = {}) {
    await network.promise;
    const signals = [cut.signal, request.signal].filter(Boolean);
    return fetch(resource, { ...request, signal: AbortSignal.any(signals) });
}

function describe(event) {
    return {
        event_id: event.getId(),
        sender: event.getSender(),
        type: event.getType(),
        content: event.getContent(),
        encrypted: event.isEncrypted(),
        remaining_ms: event.unstableStickyExpiresAt && event.unstableStickyExpiresAt - Date.now(),
    };
}

function findRoom(roomId) {
    const room = client.getRoom(roomId);
    if (!room) throw new Error(`the client does not know the room ${roomId}`);
    return room;
}

function session(roomId) {
    return client.matrixRTC.getRoomSession(findRoom(roomId));
}

function slidingSync() {
    const window = { timeline_limit: options.timeline_limit, required_state: [["*", "*"]] };
    const lists = new Map([["all", { ...window, ranges: [[0, 99]] }]]);
    return new SlidingSync(options.base_url, lists, window, client, LONG_POLL_MS);
}

/** Notes what the SDK says of a room's sticky events, from when it says that there is the room. */
function follow(room) {
    const noted = [];
    changes.set(room.roomId, noted);
    room.on(RoomStickyEventsEvent.Update, (added, updated, removed) => {
        noted.push({
            added: added.map((event) => event.getId()),
            updated: updated.map(({ current, previous }) => [previous.getId(), current.getId()]),
            removed: removed.map((event) => event.getId()),
        });
    });
}

async function startSyncing() {
    const prepared = new Promise((resolve) => {
        const listen = (state) => {
            if (state !== SyncState.Prepared && state !== SyncState.Syncing) return;
            client.off(ClientEvent.Sync, listen);
            resolve();
        };
        client.on(ClientEvent.Sync, listen);
    });
    await client.startClient({
        initialSyncLimit: options.timeline_limit,
        pollTimeout: LONG_POLL_MS,
        slidingSync: options.sliding ? slidingSync() : undefined,
    });
    await prepared;
}

const commands = {
    /** Logs nobody in: the tests have a token. `timeline_limit` is that of an initial sync. */
    async start(given) {
        options = given;
        client = createClient({
            baseUrl: given.base_url,
            userId: given.user_id,
            deviceId: given.device_id,
            accessToken: given.access_token,
            fetchFn: fetchOverNetwork,
        });
        client.on(ClientEvent.Room, follow);
        // There is no IndexedDB: the keys are in memory.
        if (given.encrypted) await client.initRustCrypto({ useIndexedDB: false });
        await startSyncing();
    },

    /** Takes the network away, as from a device that sleeps or is in a tunnel. */
    disconnect() {
        network = Promise.withResolvers();
        cut.abort();
    },
    connect() {
        cut = new AbortController();
        network.resolve();
        client.retryImmediately();
    },

    async send({ room_id, type, content, sticky_ms, delay_ms }) {
        const rest = [null, type, content];
        if (delay_ms !== undefined) {
            const delay = { delay: delay_ms };
            const answer = await client._unstable_sendStickyDelayedEvent(room_id, sticky_ms, delay, ...rest);
            return answer.delay_id;
        }
        const answer =
            sticky_ms === undefined
                ? await client.sendEvent(room_id, ...rest)
                : await client._unstable_sendStickyEvent(room_id, sticky_ms, ...rest);
        return answer.event_id;
    },

    async redact({ room_id, event_id }) {
        return (await client.redactEvent(room_id, event_id)).event_id;
    },

    async join({ room_id, via }) {
        await client.joinRoom(room_id, { viaServers: via });
    },

    members({ room_id }) {
        const room = client.getRoom(room_id);
        return room ? room.getMembersWithMembership(KnownMembership.Join).map((m) => m.userId) : [];
    },

    /** Devices of these users that we have keys of. */
    async devices({ user_ids }) {
        const byUser = await client.getCrypto().getUserDeviceInfo(user_ids, true);
        return [...byUser.values()].flatMap((devices) => [...devices.keys()]);
    },

    /** The events that are sticky, by the SDK's map. */
    sticky({ room_id }) {
        const room = client.getRoom(room_id);
        return room ? [...room._unstable_getStickyEvents()].map(describe) : [];
    },

    changes: ({ room_id }) => changes.get(room_id) ?? [],

    timeline: ({ room_id }) => findRoom(room_id).getLiveTimeline().getEvents().map(describe),

    /** Takes part in the room's call, with a sticky membership. */
    join_call({ room_id, config }) {
        const [userId, deviceId] = [client.getUserId(), client.getDeviceId()];
        const call = session(room_id);
        call.on(MatrixRTCSessionEvent.EncryptionKeyChanged, (_key, _index, membership) => {
            if (!keys.has(room_id)) keys.set(room_id, new Set());
            keys.get(room_id).add(membership.userId);
        });
        const identity = { userId, deviceId, memberId: `${userId}:${deviceId}` };
        call.joinRTCSession(identity, [], TRANSPORT, { ...config, unstableSendStickyEvents: true });
    },

    leave_call: ({ room_id }) => session(room_id).leaveRoomSession(10_000),

    /** Whom the session takes for participants. */
    participants({ room_id }) {
        if (!client.getRoom(room_id)) return [];
        return session(room_id).memberships.map((membership) => membership.userId);
    },

    call_status: ({ room_id }) => session(room_id).membershipStatus,

    media_keys: ({ room_id }) => [...(keys.get(room_id) ?? [])],
};

for await (const line of createInterface({ input: process.stdin })) {
    const { do: name, ...given } = JSON.parse(line);
    let answer;
    try {
        answer = { result: (await commands[name](given)) ?? null };
    } catch (error) {
        console.error(error);
        answer = { error: { name: error.name, errcode: error.errcode, message: error.message } };
    }
    process.stdout.write(JSON.stringify(answer) + "\n");
}
process.exit(0);
