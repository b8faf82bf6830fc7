-- Turns: a transaction reserves its place before it commits (reserve.lua). `turns` is a sorted set of them by the time
-- of the reservation (us); `held` has, by turn, the elements that arrived while an earlier turn was open.

-- The next place among the turns.
local function place(turns)
  local time = redis.call('TIME')
  local last = redis.call('ZRANGE', turns, -1, -1, 'WITHSCORES')[2]
  return text(math.max(time[1] * 1000000 + time[2], (last or 0) + 1))
end

-- The place of a batch that has none, or lost it by waiting: before the later turns of the same writer, or behind all.
-- `found` keeps the first of these for each writer: the batches of a script come in the order of their turns.
local function late_place(turns, turn, found)
  local writer = turn:match('^(.*):')
  if not writer then return place(turns) end
  local later = found[writer]
  if later == nil or (later and later.turn <= turn) then
    later = false
    local open = redis.call('ZRANGE', turns, 0, -1, 'WITHSCORES')
    for index = 1, #open, 2 do
      if open[index] > turn and open[index]:match('^(.*):') == writer then
        later = {turn = open[index], place = string.format('%.1f', open[index + 1] - 0.5)}
        break
      end
    end
    found[writer] = later
  end
  return later and later.place or place(turns)
end

-- Queue what `held` has of a turn. Returns whether it had anything.
local function unhold(queue, held, turn)
  local elements = redis.call('HGET', held, turn)
  if not elements then return false end
  local stamp = struct.pack('>d', now_ms())
  for _, element in ipairs(cmsgpack.unpack(elements)) do redis.call('RPUSH', queue, stamp .. element) end
  redis.call('HDEL', held, turn)
  return true
end

-- Queue what is held and no longer behind an open turn. A turn older than `patience` ms is waited for no more.
-- Returns whether anything was queued.
local function settle(queue, state, turns, held, patience)
  local now = now_ms()
  local queued = false
  while true do
    local first = redis.call('ZRANGE', turns, 0, 0, 'WITHSCORES')
    if not first[1] then break end
    if unhold(queue, held, first[1]) then
      queued = true
    elseif now - first[2] / 1000 < tonumber(patience) then
      break
    end
    redis.call('ZREM', turns, first[1])
  end
  if redis.call('EXISTS', turns) == 0 then
    -- Nothing is held without a turn, unless Redis threw the turns away when it ran out of memory.
    local left = redis.call('HKEYS', held)
    table.sort(left)
    for _, turn in ipairs(left) do queued = unhold(queue, held, turn) or queued end
  elseif redis.call('EXISTS', held) == 0 then
    -- Turns that hold nothing up go by themselves, with the processes that may have died; what is held never does.
    redis.call('PEXPIRE', turns, 10 * patience)
  end
  -- The state of an idle stream expires; that of one with something to deliver never does.
  if queued then redis.call('PERSIST', state) end
  return queued
end
