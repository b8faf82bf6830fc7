-- Append batches to a stream. KEYS: queue, state, turns, held, ids.
-- ARGV: ms for which ids are kept, ms for which an earlier turn is waited for;
-- then for each batch its id, its turn or '', number of events, number of elements, and the elements.
-- Returns 1 when the stream needs a wake-up.
local queue, state, turns, held, ids = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now = now_ms()
local stamp = struct.pack('>d', now)
local position, added, queued, found = 3, false, false, {}
redis.call('ZREMRANGEBYSCORE', ids, '-inf', now - ARGV[1])
while position <= #ARGV do
  local id, turn, events, elements = ARGV[position], ARGV[position + 1], ARGV[position + 2], tonumber(ARGV[position + 3])
  if redis.call('ZADD', ids, 'NX', now, id) == 1 then
    local first = redis.call('ZRANGE', turns, 0, 0)[1]
    if first and first == turn then
      redis.call('ZREM', turns, turn)
      first = nil
    end
    if not first then
      for offset = 4, 3 + elements do redis.call('RPUSH', queue, stamp .. ARGV[position + offset]) end
      queued = true
    else
      if not redis.call('ZSCORE', turns, turn) then
        turn = turn ~= '' and turn or id
        redis.call('ZADD', turns, late_place(turns, turn, found), turn)
      end
      local waiting = redis.call('HGET', held, turn)
      local later = waiting and cmsgpack.unpack(waiting) or {}
      for offset = 4, 3 + elements do later[#later + 1] = ARGV[position + offset] end
      redis.call('HSET', held, turn, cmsgpack.pack(later))
      redis.call('PERSIST', turns)
    end
    redis.call('HINCRBY', state, 'batches', 1)
    redis.call('HINCRBY', state, 'events', events)
    added = true
  end
  queued = settle(queue, state, turns, held, ARGV[2]) or queued
  position = position + 4 + elements
end
redis.call('PEXPIRE', ids, ARGV[1])
if added or queued then redis.call('PERSIST', state) end
return queued and ask(state, now) or 0
