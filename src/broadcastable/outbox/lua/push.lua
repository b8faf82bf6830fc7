-- Append batches to a stream. KEYS: queue, state, ids.
-- ARGV: ms for which ids are kept; then for each batch its id, number of events, number of elements, and the elements.
-- Returns 1 when the stream needs a wake-up.
local queue, state, ids = KEYS[1], KEYS[2], KEYS[3]
local now = now_ms()
local stamp = struct.pack('>d', now)
local position, added = 2, false
redis.call('ZREMRANGEBYSCORE', ids, '-inf', now - ARGV[1])
while position <= #ARGV do
  local id, events, elements = ARGV[position], ARGV[position + 1], tonumber(ARGV[position + 2])
  if redis.call('ZADD', ids, 'NX', now, id) == 1 then
    for offset = 3, 2 + elements do
      redis.call('RPUSH', queue, stamp .. ARGV[position + offset])
    end
    redis.call('HINCRBY', state, 'batches', 1)
    redis.call('HINCRBY', state, 'events', events)
    added = true
  end
  position = position + 3 + elements
end
redis.call('PEXPIRE', ids, ARGV[1])
if not added then return 0 end
-- The state of an idle stream expires; that of one with something to deliver never does.
redis.call('PERSIST', state)
local held = redis.call('HMGET', state, 'woken', 'parked', 'after')
if held[1] or held[2] or tonumber(held[3] or 0) > now then return 0 end
redis.call('HSET', state, 'woken', text(now))
return 1
