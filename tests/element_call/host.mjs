// SPDX-License-Identifier: AGPL-3.0-or-later
//
// The least of a client that can show Element Call: it syncs one user with matrix-js-sdk, and gives
// one room to Element Call in a frame, over the widget API. The tests use `window.host`.

import { createClient, ClientEvent, RoomStateEvent, SyncState } from "matrix-js-sdk";
import { ClientWidgetApi, OpenIDRequestState, Widget, WidgetDriver } from "matrix-widget-api";

const WIDGET_ID = "call";
/** What Element Call tells its host, and wants to be answered. */
const ACTIONS = [
    "io.element.join",
    "io.element.device_mute",
    "im.vector.hangup",
    "io.element.close",
    "set_always_on_screen",
];

/** What the tests read of what happened between Element Call and this page. */
const noted = {
    /** The capabilities that it asked for, all of which it has. */
    capabilities: [],
    actions: [],
    /** The events that were sticky as it started. */
    sticky_at_start: [],
    /** Who sent it keys for media, encrypted. */
    keys_from: [],
};

/** Does for Element Call what needs a user's token. */
class Driver extends WidgetDriver {
    constructor(client, roomId) {
        super();
        this.client = client;
        this.roomId = roomId;
    }

    async validateCapabilities(requested) {
        noted.capabilities = [...requested];
        return requested;
    }

    async sendEvent(type, content, stateKey) {
        const { event_id: eventId } =
            stateKey === null
                ? await this.client.sendEvent(this.roomId, null, type, content)
                : await this.client.sendStateEvent(this.roomId, type, content, stateKey);
        return { roomId: this.roomId, eventId };
    }

    async sendStickyEvent(stickyMs, type, content) {
        const event = [null, type, content];
        const { event_id: eventId } = await this.client._unstable_sendStickyEvent(this.roomId, stickyMs, ...event);
        return { roomId: this.roomId, eventId };
    }

    async sendDelayedStickyEvent(delay, stickyMs, type, content) {
        const rest = [{ delay }, null, type, content];
        const { delay_id: delayId } = await this.client._unstable_sendStickyDelayedEvent(
            this.roomId,
            stickyMs,
            ...rest,
        );
        return { roomId: this.roomId, delayId };
    }

    async cancelScheduledDelayedEvent(delayId) {
        await this.client._unstable_cancelScheduledDelayedEvent(delayId);
    }

    async restartScheduledDelayedEvent(delayId) {
        await this.client._unstable_restartScheduledDelayedEvent(delayId);
    }

    async sendScheduledDelayedEvent(delayId) {
        await this.client._unstable_sendScheduledDelayedEvent(delayId);
    }

    /** Sends the keys for media, for which Element Call names the devices that take part. */
    async sendToDevice(type, encrypted, contents) {
        for (const [userId, devices] of Object.entries(contents)) {
            for (const [deviceId, payload] of Object.entries(devices)) {
                await this.client.queueToDevice(
                    encrypted
                        ? await this.client.getCrypto().encryptToDeviceMessages(type, [{ userId, deviceId }], payload)
                        : { eventType: type, batch: [{ userId, deviceId, payload }] },
                );
            }
        }
    }

    async readStickyEvents() {
        const events = [...this.client.getRoom(this.roomId)._unstable_getStickyEvents()];
        await Promise.all(events.map((event) => this.client.decryptEventIfNeeded(event)));
        noted.sticky_at_start = events.map((event) => event.getId());
        return events.map((event) => event.getEffectiveEvent());
    }

    async readRoomState(_roomId, type, stateKey) {
        const state = this.client.getRoom(this.roomId).currentState;
        // With a key it is one event or null, without one a list.
        const found = [state.getStateEvents(type, stateKey)].flat().filter(Boolean);
        // The user's own membership first: the SDK in Element Call looks whether the user is in the
        // room before it takes each of these, once it has been given a sticky event. If the
        // membership were the last, "Something went wrong": Element Call would find no room.
        const isOwn = (event) => event.getStateKey() === this.client.getUserId();
        found.sort((a, b) => isOwn(b) - isOwn(a));
        return found.map((event) => event.getEffectiveEvent());
    }

    async readRoomTimeline() {
        return [];
    }

    async readEventRelations() {
        return { chunk: [] };
    }

    /** Proves to the media server's service who the user is. */
    async askOpenID(observer) {
        const token = await this.client.getOpenIdToken();
        observer.update({ state: OpenIDRequestState.Allowed, token });
    }

    async getRtcTransports() {
        return { rtc_transports: await this.client._unstable_getRTCTransports() };
    }

    getKnownRooms() {
        return [this.roomId];
    }

    /** Tells Element Call which error Synapse answered. */
    processError(error) {
        return error.asWidgetApiErrorData && { matrix_api_error: error.asWidgetApiErrorData() };
    }
}

async function startClient({ base_url, user_id, device_id, access_token, encrypted, timeline_limit }) {
    const client = createClient({
        baseUrl: base_url,
        userId: user_id,
        deviceId: device_id,
        accessToken: access_token,
    });
    if (encrypted) await client.initRustCrypto({ useIndexedDB: false });
    const prepared = new Promise((resolve) => {
        client.on(ClientEvent.Sync, (state) => state === SyncState.Prepared && resolve());
    });
    await client.startClient({ initialSyncLimit: timeline_limit });
    await prepared;
    return client;
}

function urlOfElementCall({ base_url, user_id, device_id, room_id }) {
    const url = new URL("element-call/index.html", location.href);
    const parameters = new URLSearchParams({
        widgetId: WIDGET_ID,
        parentUrl: location.href,
        roomId: room_id,
        userId: user_id,
        deviceId: device_id,
        baseUrl: base_url,
        intent: "join_existing",
        skipLobby: "true",
        // With the room's name and how many take part.
        header: "standard",
    });
    url.hash = `?${parameters}`;
    return url.href;
}

/** Tells Element Call what happens in the room; the widget API leaves out what it may not see. */
function feed(api, client, roomId) {
    // Events of the timeline, and of the sticky section: the SDK makes no difference here.
    client.on(ClientEvent.Event, async (event) => {
        if (event.getRoomId() !== roomId) return;
        await client.decryptEventIfNeeded(event);
        await api.feedEvent(event.getEffectiveEvent());
    });
    client.on(RoomStateEvent.Events, async (event) => {
        if (event.getRoomId() === roomId) await api.feedStateUpdate(event.getEffectiveEvent());
    });
    client.on(ClientEvent.ReceivedToDeviceMessage, async ({ message, encryptionInfo }) => {
        if (message.type === "io.element.call.encryption_keys" && encryptionInfo) {
            noted.keys_from.push(message.sender);
        }
        await api.feedToDevice(message, encryptionInfo !== null);
    });
}

let client;
let given;

window.host = {
    noted,

    async start(options) {
        given = options;
        client = await startClient(given);
    },

    /** Opens Element Call, which joins the call by itself. */
    open() {
        const widget = new Widget({
            id: WIDGET_ID,
            creatorUserId: given.user_id,
            type: "m.call",
            url: urlOfElementCall(given),
            // Element Call says when it is ready.
            waitForIframeLoad: false,
        });
        const frame = document.createElement("iframe");
        frame.allow = "autoplay; camera; microphone; display-capture";
        document.body.append(frame);
        const api = new ClientWidgetApi(widget, frame, new Driver(client, given.room_id));
        for (const action of ACTIONS) {
            api.on(`action:${action}`, (event) => {
                // So that the widget API does not refuse an action that it does not know.
                event.preventDefault();
                noted.actions.push(action);
                api.transport.reply(event.detail, {});
            });
        }
        feed(api, client, given.room_id);
        frame.src = widget.templateUrl;
    },
};
