-- How much waits. KEYS: queue, state, turns, held. Returns false, or {batches, events, created_at of the first, parked}.
local queue, state = KEYS[1], KEYS[2]
local head = redis.call('LINDEX', queue, 0)
local waits = redis.call('HLEN', KEYS[4])
if not head and waits == 0 then return false end
local held = redis.call('HMGET', state, 'batches', 'events', 'parked')
local least = redis.call('LLEN', queue) + waits
local oldest = head and struct.unpack('>d', head, 9) or now_ms()
return {held[1] or least, held[2] or least, text(oldest), held[3]}
