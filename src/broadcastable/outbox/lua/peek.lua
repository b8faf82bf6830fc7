-- How much waits. KEYS: queue, state. Returns false, or {batches, events, created_at of the first, parked}.
local queue, state = KEYS[1], KEYS[2]
local head = redis.call('LINDEX', queue, 0)
if not head then return false end
local held = redis.call('HMGET', state, 'batches', 'events', 'parked')
local least = redis.call('LLEN', queue)
return {held[1] or least, held[2] or least, text((struct.unpack('>d', head, 9))), held[3]}
